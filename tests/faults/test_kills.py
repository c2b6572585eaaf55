"""SIGKILL at chosen and at random moments, on one and on several ranks: the run ends where an undisturbed one ends."""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
from launching import launch
from small_run import (
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
    write_data,
)

from trainer import train

# In this order each attempt gets beyond the last point: saves are after 7, 14, 21, 28, 35 steps.
POINTS = [
    "step:3", "write:7", "rename:7", f"step:{STEPS_PER_EPOCH}", "complete:14", "latest:14", f"step:{SWITCH}", "wake",
    f"step:{SWITCH + 1}", "write:28", f"step:{TOTAL - 1}", f"write:{TOTAL}",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train_here(folder, small_data) == 0
    return folder


def test_two_ranks_killed_while_saving_and_at_the_switch(undisturbed: Path, small_data: Path, tmp_path: Path) -> None:
    for point in ("write:14", f"step:{SWITCH + 1}"):
        assert launch(tmp_path, small_data, world=2, die_at=point).returncode != 0
    assert launch(tmp_path, small_data).returncode == 0  # and on to the end on one rank
    assert digests(undisturbed) == digests(tmp_path)
    close(undisturbed, tmp_path)


def close(one: Path, other: Path) -> None:
    """Losses of every step within 1e-4."""
    for step, line in metrics(one).items():
        for name in ("loss", "loss/rec", "loss/sp", "loss/bind", "loss/perp", "loss/val"):
            assert metrics(other)[step][name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [0, 1, 4])
def test_row_digests_over_worlds_threads_and_kill_points(
    world: int, threads: int, undisturbed: Path, small_data: Path, tmp_path: Path
) -> None:
    reader = f"data.threads={threads}"
    for point in POINTS:
        ended = launch(tmp_path, small_data, reader, world=world, die_at=point)
        assert ended.returncode != 0, (point, ended.stderr[-2000:])
    assert launch(tmp_path, small_data, reader, world=world).returncode == 0
    assert digests(undisturbed) == digests(tmp_path)
    assert outcome(tmp_path)["rows_digest"] == digests(undisturbed)[TOTAL]
    if world == 1:
        assert_same(tensors(undisturbed), tensors(tmp_path))
    close(undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_fifty_kills_at_random_moments(asynchronous: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = write_data(tmp_path / "data")
    argv = ["stages.0.epochs=60", "stages.1.epochs=60", "revival.every=50", "checkpoint.every=10"]
    argv += [f"checkpoint.asynchronous={asynchronous}", "run.log_every=10"]
    assert train_here(tmp_path / "undisturbed", data, *argv) == 0
    # Real processes and real kills; forked from one that has imported everything, which would take most of the time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train"])
    generator, moments = random.Random(1), []
    folder = tmp_path / "killed"
    while len(moments) < 50:
        process = context.Process(target=train.main, args=(arguments(folder, data, *argv),))
        began = newest_step(folder)
        process.start()
        if len(moments) % 2:  # somewhere between the start and the first steps
            time.sleep(generator.random())
        else:  # right after a save of this attempt: while it cleans up, trains, or saves again
            deadline = time.monotonic() + 60
            while newest_step(folder) == began and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(generator.random() * 0.2)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode} after {len(moments)} kills"
        moments.append(newest_step(folder).strip())
    assert launch(folder, data, *argv).returncode == 0
    assert_same(tensors(tmp_path / "undisturbed"), tensors(folder))
    assert digests(tmp_path / "undisturbed") == digests(folder)
    print(json.dumps({"kills": len(moments), "newest_checkpoint_at_each": moments}))


def newest_step(folder: Path) -> str:
    """Name of the newest complete checkpoint."""
    latest = folder / "run" / "checkpoints" / "latest"
    return latest.read_text() if latest.exists() else ""
