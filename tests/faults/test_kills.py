"""SIGKILL at chosen and at random moments, on one and on several ranks: the run ends where an undisturbed one ends."""

import math
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.dying import train_apart, train_slowly
from tests.support.data import write_data
from tests.support.ranks import Ranks
from tests.support.runs import (
    STEPS_PER_EPOCH,
    SWITCH,
    TOTAL,
    arguments,
    assert_same,
    digests,
    metrics,
    outcome,
    tensors,
    train_here,
)

# In this order each attempt gets beyond the last point: saves are after 7, 14, 21, 28, 35 steps.
POINTS = [
    "step:3", "write:7", "rename:7", f"step:{STEPS_PER_EPOCH}", "complete:14", "latest:14", f"step:{SWITCH}", "wake",
    f"step:{SWITCH + 1}", "write:28", f"step:{TOTAL - 1}", f"write:{TOTAL}",
]  # fmt: skip

WORLDS, THREADS = (1, 2, 4), (0, 1, 4)
KILLS = int(os.environ.get("ALIGNSAE_KILLS", "50"))  # at random moments


@pytest.fixture(scope="module")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train_here(folder, small_data) == 0
    return folder


def test_two_ranks_killed_while_saving_and_at_the_switch(undisturbed: Path, small_data: Path, tmp_path: Path) -> None:
    for point in ("write:14", f"step:{SWITCH + 1}"):
        assert any(train_apart(tmp_path, small_data, world=2, die_at=point).codes)
    assert train_apart(tmp_path, small_data).codes == [0]  # and on to the end on one rank
    assert digests(undisturbed) == digests(tmp_path)
    close(undisturbed, tmp_path)


def close(one: Path, other: Path) -> None:
    """Losses of every step within 1e-4."""
    for step, line in metrics(one).items():
        losses = {name: value for name, value in line.items() if name.startswith("loss")}
        assert {name for name in metrics(other)[step] if name.startswith("loss")} == set(losses)
        for name, value in losses.items():
            assert metrics(other)[step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("threads", THREADS)
def test_row_digests_over_worlds_threads_and_kill_points(
    world: int, threads: int, undisturbed: Path, small_data: Path, tmp_path: Path
) -> None:
    """Each meets a third of the points, so that every world and every number of threads meets all of them."""
    reader = f"data.threads={threads}"
    for point in POINTS[(WORLDS.index(world) + THREADS.index(threads)) % 3 :: 3]:
        ended = train_apart(tmp_path, small_data, reader, world=world, die_at=point)
        assert -signal.SIGKILL in ended.codes, (point, ended.report())
    ended = train_apart(tmp_path, small_data, reader, world=world)
    assert not any(ended.codes), ended.report()
    assert digests(undisturbed) == digests(tmp_path)
    assert outcome(tmp_path)["rows_digest"] == digests(undisturbed)[TOTAL]
    if world == 1:
        assert_same(tensors(undisturbed), tensors(tmp_path))
    close(undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_kills_at_random_moments(asynchronous: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    # Attempts come in pairs, which take 50 and 10 + 10 steps at most; a stage is for half of the pairs.
    epochs = math.ceil(KILLS / 4 * 70 / STEPS_PER_EPOCH)
    argv = [f"stages.0.epochs={epochs}", f"stages.1.epochs={epochs}", "revival.every=50", "checkpoint.every=10"]
    argv += [f"checkpoint.asynchronous={asynchronous}", "run.log_every=10"]
    assert train_here(tmp_path / "undisturbed", data, *argv) == 0
    generator, moments = random.Random(1), list[str]()
    folder = tmp_path / "killed"
    while len(moments) < KILLS:
        began = newest_step(folder)
        with Ranks(1, train_slowly, arguments(folder, data, *argv), 0.02) as ranks:
            if len(moments) % 2:  # somewhere between the start and the first steps
                time.sleep(generator.random())
            else:  # right after a save of this attempt: while it cleans up, trains, or saves again
                deadline = time.monotonic() + 60
                while newest_step(folder) == began and ranks.running and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(generator.random() * 0.2)
            ranks.kill()
            codes = ranks.wait().codes
        assert codes == [-signal.SIGKILL], f"ended with {codes} after {len(moments)} kills"
        moments.append(newest_step(folder).strip())
    assert train_apart(folder, data, *argv).codes == [0]
    assert_same(tensors(tmp_path / "undisturbed"), tensors(folder))
    assert digests(tmp_path / "undisturbed") == digests(folder)
    assert len(set(moments)) >= KILLS // 2, moments  # it got on between the kills


def newest_step(folder: Path) -> str:
    """Name of the newest complete checkpoint."""
    latest = folder / "run" / "checkpoints" / "latest"
    return latest.read_text() if latest.exists() else ""
