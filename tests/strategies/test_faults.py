"""What cannot be is refused before ranks meet; a rank that dies takes the job down at once, by name."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.strategies.curriculum_runs import CURRICULUM
from tests.support.commands import start, torchrun
from tests.support.ranks import Ranks
from tests.support.runs import arguments, metrics, train_rank
from trainer import loop, train
from trainer.errors import UserError
from trainer.strategies import ParallelConfig
from trainer.topology import launched_world


def train_and_throw(argv: list[str]) -> None:
    """A rank that trains; rank 1 throws before update 5."""
    original = loop.to_micro_batch

    def failing(run, rows):
        if run.state.step == 5 and launched_world()[0] == 1:
            raise RuntimeError("thrown on purpose")
        return original(run, rows)

    loop.to_micro_batch = failing
    train_rank(argv)


@pytest.mark.parametrize(
    "settings,world,message",
    [
        ({"strategy": "zero4"}, 1, "use one of auto, single, ddp"),
        ({"strategy": "single"}, 2, "set parallel.strategy=ddp"),
        ({"dictionary_ranks": 3}, 4, "nearest possible setting is 2"),
        ({"dictionary_ranks": 8}, 8, "nearest possible setting is parallel.dictionary_ranks=4"),
        ({"strategy": "zero3", "dictionary_ranks": 2}, 4, "set parallel.dictionary_ranks=1"),
        ({"strategy": "ddp", "offload": True}, 2, "set parallel.offload=false"),
        ({"timeout": 0.0}, 2, "parallel.timeout"),
    ],
)
def test_impossible_settings_name_the_nearest_possible_one(settings, world, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**settings).resolve(world, banks=5)


def test_the_launch_file_chooses_the_strategy(monkeypatch):
    assert ParallelConfig().resolve(1, 5).strategy == "single"
    assert ParallelConfig().resolve(2, 5).strategy == "ddp"
    assert ParallelConfig("dictionary").resolve(4, 5).dictionary_ranks == 4
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    mesh = ParallelConfig().resolve(4, 5)
    assert (mesh.strategy, mesh.dictionary_ranks) == ("dictionary", 2)
    monkeypatch.delenv("ACCELERATE_USE_PARALLELISM_CONFIG")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    zero = ParallelConfig().resolve(2, 5)
    assert (zero.strategy, zero.zero_stage, zero.offload) == ("zero3", 3, True)
    with pytest.raises(UserError, match="the launch file starts zero3"):
        ParallelConfig("ddp").resolve(2, 5)


@pytest.mark.parametrize(
    "world,override,message",
    [
        (4, "parallel.dictionary_ranks=3", "nearest possible setting is 2"),
        (3, "parallel.strategy=ddp", "data.lanes"),
        (2, "data.lanes=5", "data.lanes"),
        (2, "parallel.deepspeed=launch/deepspeed/zero3.json", "needs parallel.strategy=zero1, zero2 or zero3"),
    ],
)
def test_refusals_come_before_any_process_group(small_data, tmp_path, monkeypatch, capsys, world, override, message):
    """The other ranks do not exist here: a process group would never form."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, str(value))
    assert train.main(arguments(tmp_path, small_data, override, changes=CURRICULUM)) == 2
    assert message in capsys.readouterr().err


def process_of_rank(launcher_pid: int, rank: int) -> int:
    """Pid of the child of a launcher that has RANK in its environment."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rsplit(")", 1)[1].split()[1]) != launcher_pid:
                continue
            if f"RANK={rank}".encode() in (status.parent / "environ").read_bytes().split(b"\0"):
                return int(status.parent.name)
        except (OSError, IndexError):
            continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
@pytest.mark.parametrize(
    "strategy",
    ["dictionary", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)],
)
def test_a_killed_rank_ends_the_job_by_name(small_data, tmp_path, strategy):
    argv = arguments(
        tmp_path, small_data, "stages.0.steps=10000000", f"parallel.strategy={strategy}", changes=CURRICULUM
    )
    job = start(torchrun(2, "-m", "trainer.train", *argv))
    try:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path)) > 3):
            assert time.monotonic() < deadline and job.poll() is None, job.communicate(timeout=10)[0]
            time.sleep(0.2)
        os.kill(process_of_rank(job.pid, 1), signal.SIGKILL)
        killed = time.monotonic()
        output, _ = job.communicate(timeout=90)
    finally:
        job.kill()
    assert time.monotonic() - killed < 60
    assert job.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in output and "Signal 9 (SIGKILL)" in output


def test_an_exception_on_one_rank_ends_every_rank(small_data, tmp_path):
    with Ranks(2, train_and_throw, arguments(tmp_path, small_data, changes=CURRICULUM)) as ranks:
        ended = ranks.wait()
    assert "RuntimeError: thrown on purpose" in ended.outputs[1]
    assert ended.codes[1] == 1 and ended.codes[0] > 0, ended.report()  # not ended by the signal that ends what hangs
