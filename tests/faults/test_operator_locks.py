"""Locks of DeepSpeed's operator builds: those of killed builds go, those of living ones stay."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.dying import train_apart
from trainer.strategies.operator_locks import remove_left_locks


def lock_of(root: Path, age: float, name: str = "deepspeed_shm_comm") -> Path:
    """A lock, and a file of the build, of some seconds ago."""
    path = root / name / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in (path.parent / "build.ninja", path):
        file.touch()
        os.utime(file, (time.time() - age, time.time() - age))
    return path


@pytest.mark.parametrize("name", ["op", "py311_cpu/op"])
def test_a_lock_that_nobody_holds_is_removed(name: str, tmp_path: Path, caplog) -> None:
    lock = lock_of(tmp_path, 10_000, name)
    remove_left_locks(tmp_path)
    assert not lock.exists() and (lock.parent / "build.ninja").exists()
    (said,) = caplog.messages
    assert str(lock) in said and "killed" in said
    remove_left_locks(tmp_path)
    remove_left_locks(tmp_path / "not there")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("holds", ["os.chdir(sys.argv[1])", "f = os.open(sys.argv[1] + '/lock', os.O_RDONLY)"])
def test_a_build_of_this_host_keeps_its_lock(holds: str, tmp_path: Path) -> None:
    lock = lock_of(tmp_path, 10_000)
    code = f"import os, sys, time; {holds}; print('holds', flush=True); time.sleep(60)"
    builder = subprocess.Popen([sys.executable, "-c", code, str(lock.parent)], stdout=subprocess.PIPE)
    try:
        assert builder.stdout is not None and builder.stdout.readline() == b"holds\n"
        remove_left_locks(tmp_path, quiet=0)
        assert lock.exists()
    finally:
        builder.kill()
        builder.wait()
    remove_left_locks(tmp_path, quiet=0)
    assert not lock.exists()


def test_a_lock_newer_than_this_process_may_be_of_another_rank(tmp_path: Path) -> None:
    lock = lock_of(tmp_path, 0)
    remove_left_locks(tmp_path, quiet=0)
    assert lock.exists()


def test_a_build_elsewhere_is_waited_for_while_it_writes(tmp_path: Path, monkeypatch, caplog) -> None:
    lock = lock_of(tmp_path, 1)
    monkeypatch.setattr("trainer.strategies.operator_locks._began", time.time)
    began = time.monotonic()
    remove_left_locks(tmp_path, quiet=2.5)
    assert not lock.exists() and 1 < time.monotonic() - began < 20
    assert "waiting" in caplog.messages[0] and "removed" in caplog.messages[1]


@pytest.mark.slow
def test_zero_starts_where_a_killed_build_left_its_lock(small_data: Path, tmp_path: Path, monkeypatch) -> None:
    built, extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "nowhere")), tmp_path / "extensions"
    if built.is_dir():  # so that there is little to compile
        shutil.copytree(built, extensions, ignore=shutil.ignore_patterns("*lock"))
    lock = lock_of(extensions, 10_000)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    settings = ["parallel.strategy=zero2", "stages.0.epochs=1"]
    ended = train_apart(tmp_path, small_data, *settings, world=2, limit=900)  # it may compile
    assert ended.codes == [0, 0], ended.report()
    assert f"removed {lock}" in "".join(ended.outputs) and not lock.exists()
