"""A user reads one line, and the exit code comes through, however training was started."""

import os
import re
import time
from pathlib import Path

import pytest
import torch

from tests.support.commands import Result, launch, program, torchrun
from tests.support.ranks import Ranks
from tests.support.runs import arguments, outcome, train_rank
from tools.cli import chosen_device, main
from trainer import loop
from trainer.errors import UserError
from trainer.failures import in_one_line
from trainer.stepping import Run
from trainer.stream import Batch
from trainer.sums import MicroBatch


def train_and_fail(argv: list[str], how: str) -> None:
    """A rank that trains; rank 1 hangs, or is gone, before its fourth update."""
    original = loop.to_micro_batch

    def to_micro_batch(run: Run, rows: Batch) -> MicroBatch:
        if run.state.step == 3 and os.environ["RANK"] == "1":
            if how == "gone":
                os._exit(9)
            time.sleep(600)
        return original(run, rows)

    loop.to_micro_batch = to_micro_batch
    train_rank(argv)


def alignsae(*words: str) -> Result:
    """The command, as users call it."""
    return launch(program("python", "-m", "tools.cli", *words))


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error" in line.lower() or "Traceback" in line]


@pytest.mark.parametrize("world", [1, 2])
def test_a_refusal_is_one_line_with_its_code(world: int, small_data: Path, tmp_path: Path) -> None:
    ended = alignsae("train", "--processes", str(world), *arguments(tmp_path, small_data, "optim.lr=-1"))
    assert ended.code == 2
    assert len(errors(ended.output)) == 1 and "optim.lr=-1.0 must be between" in errors(ended.output)[0]


@pytest.mark.slow
def test_leaving_for_a_requeue_keeps_its_code(small_data: Path, tmp_path: Path) -> None:
    settings = ["stages.0.epochs=3000", "run.wall_minutes=0.2"]
    ended = alignsae("train", "--processes", "2", *arguments(tmp_path, small_data, *settings))
    assert ended.code == 75, ended.output[-2000:]
    assert errors(ended.output) == [] and outcome(tmp_path)["exit_code"] == 75


def test_torchrun_shows_the_line_instead_of_a_traceback(small_data: Path, tmp_path: Path) -> None:
    ended = launch(torchrun(2, "-m", "trainer.train", *arguments(tmp_path, small_data, "optim.lr=-1")))
    assert re.search(r"^  traceback : rank \d: optim.lr=-1.0 must be between 0 and 1000$", ended.output, re.MULTILINE)


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(z, marks=pytest.mark.slow) for z in ("dictionary", "zero2", "zero3"))]
)
def test_ranks_that_do_not_come_are_told_with_the_call(strategy: str, small_data: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path, small_data, "parallel.timeout=5", f"parallel.strategy={strategy}")
    with Ranks(2, train_and_fail, argv, "hang") as ranks:
        ended = ranks.wait(100)
    (line,) = [line for line in ended.outputs[0].splitlines() if line.startswith("trainer.train:")]
    assert "rank 0: error: other ranks did not come within parallel.timeout=5 s" in line
    assert "in all_reduce called by sum_over_" in line and ended.codes[0] == 2


def test_a_rank_that_is_gone_is_told(small_data: Path, tmp_path: Path) -> None:
    with Ranks(2, train_and_fail, arguments(tmp_path, small_data), "gone") as ranks:
        ended = ranks.wait(100)
    assert ended.codes == [2, 9]
    (line,) = [line for line in ended.outputs[0].splitlines() if line.startswith("trainer.train:")]
    assert "rank 0: error: another rank has gone, in all_reduce called by sum_over_" in line


def test_errors_in_words() -> None:
    assert in_one_line(KeyError("x")) is None
    assert in_one_line(RuntimeError("sizes do not match")) is None
    assert "alignsae plan" in str(in_one_line(MemoryError()))
    assert "alignsae plan" in str(in_one_line(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")))
    late = in_one_line(RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"), 5.0)
    assert late is not None and late.startswith("other ranks did not come within parallel.timeout=5 s")
    gone = in_one_line(RuntimeError("[gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:33"), 5.0)
    assert gone is not None and gone.startswith("another rank has gone")


@pytest.mark.parametrize(
    "words,says",
    [
        (["trian"], "the nearest is 'train'"),
        (["evaluate", "--run", "nowhere", "--model", "m", "--prompts", "p"], "--run nowhere: there is no such folder"),
        (["export", "--run", "nowhere", "--out", "x"], "--run nowhere: there is no such folder"),
        (["report", "--run", "x" * 300], "there is no such folder"),
        (["train", "--config", "c.yaml", "--launch", "zero33"], "the nearest name is zero3"),
        (["train", "--config", "c.yaml", "--accelerate=--bogus"], "unrecognized arguments: --bogus"),
        (["train", "--config", "c.yaml", "--processes", "0"], "--processes 0"),
        (["train"], "arguments are required: --config"),
        (["report", "--run", ".", "--nonsense"], "--nonsense"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_mistakes_at_the_command_line(words: list[str], says: str, capsys) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said


def test_a_device_that_is_not_there(small_data: Path, tmp_path: Path, capsys) -> None:
    chosen_device(None)
    chosen_device("cpu")
    for name in ("nonsense", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here") as caught:
            chosen_device(name)
        assert "\n" not in str(caught.value)


def test_sweep_names_all_points_that_cannot_be(small_data: Path, tmp_path: Path, capsys) -> None:
    config = arguments(tmp_path, small_data)[1]
    grid = ["--grid", "loss.sp=.nan,0.1", "--grid", "data.lanes=5,4", "--set", f"data.shards={small_data}"]
    assert main(["sweep", "--config", config, "--out", str(tmp_path / "s"), *grid]) == 2
    said = capsys.readouterr().err
    assert "3 of 4 points" in said and "loss.sp=nan" in said and "data.lanes=5 does not divide" in said
    assert said.count("\n") == 1 and not (tmp_path / "s").exists()
