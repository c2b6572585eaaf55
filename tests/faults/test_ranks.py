"""What all ranks must do alike: leave on a signal, skip an update, give up a save."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import command, launch
from small_run import arguments, assert_same, digests, outcome, quiet_environment, tensors, train_here, write_data

from trainer.checkpoint import verify

# Rank 1 alone cannot write in the save after 14 steps.
HALF_BROKEN = """
import os, runpy, sys
from trainer.checkpoint import saver
original = saver.Saver._write
def write(self, *rest):
    if self._state.step == 14 and os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device")
    original(self, *rest)
saver.Saver._write = write
from trainer import train
train.exit_with(train.main())
"""


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.slow
def test_one_rank_cannot_write(asynchronous: str, small_data: Path, tmp_path: Path) -> None:
    program = tmp_path / "half_broken.py"
    program.write_text(HALF_BROKEN)
    settings = [f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=9"]
    ended = launch(tmp_path, small_data, *settings, world=2, program=program)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "rank 1/2: checkpoint" in ended.stderr and "No space left" in ended.stderr
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == [7, 21, 28, 35, 40]
    stopped = launch(tmp_path / "stop", small_data, *settings, "checkpoint.on_error=stop", world=2, program=program)
    assert stopped.returncode != 0
    assert stopped.stderr.count("was not saved") == 2  # each rank says so and leaves
    assert verify(tmp_path / "stop" / "run" / "checkpoints" / "step-00000007") is None
    assert outcome(tmp_path / "stop")["exit_code"] == 2


def test_signal_to_one_rank_of_two(small_data: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path, small_data, "stages.0.epochs=3000", "run.log_every=5")
    launcher = subprocess.Popen(
        command(2, argv), env=quiet_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text()) and launcher.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(rank_process(launcher.pid, "1"), signal.SIGUSR1)
    errors = launcher.communicate(timeout=120)[1]
    ended = outcome(tmp_path)
    assert (ended["status"], ended["exit_code"]) == ("interrupted", 75), errors[-3000:]
    assert ended["checkpoint"] == f"step-{ended['step']:08d}"
    assert verify(tmp_path / "run" / "checkpoints" / str(ended["checkpoint"])) is None


def rank_process(launcher: int, rank: str) -> int:
    """Process id of a rank that this launcher started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.mark.slow
def test_bad_numbers_skip_on_all_ranks(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", dtype="float32", factors={100: 1e25, 300: 1e3})
    settings = ["guard.spike=20", "guard.window=3"]
    assert train_here(tmp_path / "one", data, *settings) == 0
    ended = launch(tmp_path / "two", data, *settings, world=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = [
        [(line["step"], line["row_ids"]) for line in map(json.loads, (tmp_path / n / "run" / "skipped.jsonl").open())]
        for n in ("one", "two")
    ]
    assert rows[0] == rows[1] and len(rows[0]) >= 6
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_second_interrupt_ends_at_once(small_data: Path, tmp_path: Path) -> None:
    """The first one is not acted on: the process hangs where no Python runs."""
    program = tmp_path / "hanging.py"
    program.write_text(
        "import threading\nfrom trainer import loop, train\nlock = threading.Lock()\n"
        "def hang(*_):\n    open('hanging', 'w').close()\n    lock.acquire()\n    lock.acquire()\n"
        "loop.to_micro_batch = hang\ntrain.exit_with(train.main())\n"
    )
    process = subprocess.Popen(
        command(1, arguments(tmp_path, small_data), program), env=quiet_environment(), cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "hanging").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


def test_asynchronous_saves_are_those_of_synchronous_ones(small_data: Path, tmp_path: Path) -> None:
    for name in ("true", "false"):
        settings = [f"checkpoint.asynchronous={name}", "checkpoint.keep=20", "checkpoint.every=3"]
        assert train_here(tmp_path / name, small_data, *settings) == 0
    for step in range(3, 40, 3):
        assert_same(*(tensors(tmp_path / name, f"step-{step:08d}") for name in ("true", "false")))
