"""What all ranks must do alike: leave on a signal, skip an update, give up a save."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.dying import train_apart
from tests.support.data import write_data
from tests.support.ranks import Ranks, run_ranks
from tests.support.runs import arguments, assert_same, digests, outcome, tensors, train_here, train_rank
from trainer import loop
from trainer.checkpoint import saver, verify
from trainer.stepping import Run
from trainer.stream import Batch
from trainer.sums import MicroBatch


def train_half_broken(argv: list[str]) -> None:
    """A rank that trains; rank 1 alone cannot write in the save after 14 steps."""
    original = saver.Saver._write

    def write(self: saver.Saver, *rest: Any) -> None:
        if self._state.step == 14 and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        original(self, *rest)

    saver.Saver._write = write  # type: ignore[method-assign, assignment]
    train_rank(argv)


def train_and_hang(argv: list[str]) -> None:
    """Training that waits for ever, where no Python runs, before its first update."""
    lock = threading.Lock()

    def hang(run: Run, rows: Batch) -> MicroBatch:
        Path("hanging").touch()
        lock.acquire()
        lock.acquire()
        raise AssertionError("nobody releases it")

    os.chdir(Path(argv[1]).parent)
    loop.to_micro_batch = hang
    train_rank(argv)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.slow
def test_one_rank_cannot_write(asynchronous: str, small_data: Path, tmp_path: Path) -> None:
    settings = [f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=9"]
    said = run_ranks(2, train_half_broken, arguments(tmp_path, small_data, *settings))[1]
    assert "rank 1/2: checkpoint" in said and "No space left" in said
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == [7, 21, 28, 35, 40]
    settings.append("checkpoint.on_error=stop")
    with Ranks(2, train_half_broken, arguments(tmp_path / "stop", small_data, *settings)) as ranks:
        stopped = ranks.wait()
    assert stopped.codes == [2, 2]
    assert all(output.count("was not saved") == 1 for output in stopped.outputs)  # each rank says so and leaves
    assert verify(tmp_path / "stop" / "run" / "checkpoints" / "step-00000007") is None
    assert outcome(tmp_path / "stop")["exit_code"] == 2


def test_signal_to_one_rank_of_two(small_data: Path, tmp_path: Path) -> None:
    journal = tmp_path / "run" / "metrics.jsonl"
    argv = arguments(tmp_path, small_data, "stages.0.epochs=3000", "run.log_every=5")
    with Ranks(2, train_rank, argv) as ranks:
        wait_until(lambda: journal.exists() and bool(journal.read_text()), ranks)
        os.kill(ranks.pids[1], signal.SIGUSR1)
        left = ranks.wait(120)
    assert left.codes == [75, 75], left.report()
    ended = outcome(tmp_path)
    assert (ended["status"], ended["exit_code"]) == ("interrupted", 75)
    assert ended["checkpoint"] == f"step-{ended['step']:08d}"
    assert verify(tmp_path / "run" / "checkpoints" / str(ended["checkpoint"])) is None


def wait_until(happened: Callable[[], bool], ranks: Ranks) -> None:
    """Wait for what running ranks do."""
    deadline = time.monotonic() + 120
    while not happened():
        assert ranks.running, ranks.wait().report()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_bad_numbers_skip_on_all_ranks(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", dtype="float32", factors={100: 1e25, 300: 1e3})
    settings = ["guard.spike=20", "guard.window=3"]
    assert train_here(tmp_path / "one", data, *settings) == 0
    ended = train_apart(tmp_path / "two", data, *settings, world=2)
    assert not any(ended.codes), ended.report()
    rows = [
        [(line["step"], line["row_ids"]) for line in map(json.loads, (tmp_path / n / "run" / "skipped.jsonl").open())]
        for n in ("one", "two")
    ]
    assert rows[0] == rows[1] and len(rows[0]) >= 6
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_second_interrupt_ends_at_once(small_data: Path, tmp_path: Path) -> None:
    """The first one is not acted on: the process hangs where no Python runs."""
    with Ranks(1, train_and_hang, arguments(tmp_path, small_data)) as ranks:
        wait_until((tmp_path / "hanging").exists, ranks)
        os.kill(ranks.pids[0], signal.SIGINT)
        time.sleep(0.5)
        assert ranks.running
        os.kill(ranks.pids[0], signal.SIGINT)
        assert ranks.wait(10).codes == [-signal.SIGINT]


def test_asynchronous_saves_are_those_of_synchronous_ones(small_data: Path, tmp_path: Path) -> None:
    for name in ("true", "false"):
        settings = [f"checkpoint.asynchronous={name}", "checkpoint.keep=20", "checkpoint.every=3"]
        assert train_here(tmp_path / name, small_data, *settings) == 0
    for step in range(3, 40, 3):
        assert_same(*(tensors(tmp_path / name, f"step-{step:08d}") for name in ("true", "false")))
