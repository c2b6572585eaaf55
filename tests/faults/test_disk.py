"""A full disk and a read-only folder under a run, on a small tmpfs (needs the right to mount)."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.runs import TOTAL, assert_same, metrics, outcome, tensors, train_here
from trainer import loop
from trainer.checkpoint import verify

SYNC = ["checkpoint.asynchronous=false"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount point of a tmpfs of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not permitted here: no tmpfs to fill")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def between(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], object]]) -> None:
    """Run actions before the updates of these steps."""
    original = loop.to_micro_batch

    def to_micro_batch(run, rows):
        actions.pop(run.state.step, lambda: None)()
        return original(run, rows)

    monkeypatch.setattr(loop, "to_micro_batch", to_micro_batch)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass


@pytest.mark.parametrize("settings", [[], SYNC], ids=["asynchronous", "synchronous"])
def test_full_disk_and_room_again(
    settings: list[str], disk: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    between(monkeypatch, {10: lambda: fill(disk), 25: lambda: (disk / "filler").unlink()})
    assert train_here(disk, small_data, *settings) == 0
    said = [m for m in caplog.messages if "was not saved" in m]
    assert len(said) == 2 and all("No space left on device" in m and "step-00000007" in m for m in said)
    root = disk / "run" / "checkpoints"
    assert sorted(p.name for p in root.glob("step-*")) == ["step-00000035", f"step-{TOTAL:08d}"]
    assert all(verify(p) is None for p in root.glob("step-*"))
    assert any("metrics.jsonl cannot be written" in m for m in caplog.messages)
    assert TOTAL in metrics(disk)  # whole lines only, and it went on


@pytest.mark.parametrize("settings", [[], SYNC], ids=["asynchronous", "synchronous"])
def test_full_disk_to_the_end(
    settings: list[str], disk: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    between(monkeypatch, {10: lambda: fill(disk)})
    assert train_here(disk, small_data, *settings) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    root = disk / "run" / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000007"]
    assert verify(root / "step-00000007") is None
    (disk / "filler").unlink()
    assert train_here(disk, small_data, *settings) == 0
    assert train_here(tmp_path / "undisturbed", small_data) == 0
    assert_same(tensors(disk), tensors(tmp_path / "undisturbed"))


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_read_only_folder(
    on_error: str, disk: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch, capsys, caplog
) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    between(monkeypatch, {10: lambda: remount("ro"), 30: lambda: remount("rw")})
    code = train_here(disk, small_data, *SYNC, f"checkpoint.on_error={on_error}")
    root = disk / "run" / "checkpoints"
    if on_error == "stop":
        assert code == 2 and "Read-only file system" in capsys.readouterr().err
        assert verify(root / "step-00000007") is None
        remount("rw")
        assert train_here(disk, small_data, *SYNC) == 0
    else:
        assert code == 0 and sum("was not saved" in m for m in caplog.messages) == 3
    assert outcome(disk)["checkpoint"] == f"step-{TOTAL:08d}"


def test_run_folder_that_cannot_be_made(small_data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "run").write_text("a file")
    assert train_here(tmp_path, small_data) == 2
    assert "run.dir" in capsys.readouterr().err.splitlines()[-1]
