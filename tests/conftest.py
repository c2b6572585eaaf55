"""Data that several suites train on. (This file also puts tests/ on the import path of the suites in its folders.)"""

import os
from pathlib import Path

import pytest

# Tests are small and many start several processes: threads would only wait for each other. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

from small_run import write_data


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard folder of small_run; read only."""
    return write_data(tmp_path_factory.mktemp("small") / "train")
