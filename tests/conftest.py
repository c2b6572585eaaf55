"""Fixtures of several suites."""

import os
from pathlib import Path

import pytest

# Tests are small and many start several processes, whose threads would wait for each other. Set before torch is there.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.support.data import write_data


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard folder of tests.support.data; read only."""
    return write_data(tmp_path_factory.mktemp("small") / "train")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `train_tiny_run`; nobody may change the runs in it."""
    from tests.support.language_model import train_tiny_run  # imports transformers, which most suites do not need

    return train_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever HF_HUB_OFFLINE says: the hub is on loopback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
