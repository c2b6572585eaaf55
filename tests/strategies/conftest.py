"""The runs that the tests of this folder compare."""

import pytest

from tests.strategies.curriculum_runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of one curriculum under every layout."""
    return Runs(tmp_path_factory.mktemp("strategies"))
