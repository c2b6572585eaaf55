"""Fixtures of the stream tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stream.stream_data import write
from trainer.stream import Manifest


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., tuple[Path, Manifest]]:
    """Writes a data set of several shards; returns its folder and manifest."""

    def make(count: int = 300, width: int = 4, name: str = "train", **options) -> tuple[Path, Manifest]:
        return tmp_path / name, write(tmp_path / name, count, width, **options)

    return make
