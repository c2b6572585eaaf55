"""Stages that were changed between a checkpoint and its resume: what is to come may change, what is past may not."""

import json
import logging
from pathlib import Path

import pytest

from tests.support.runs import STEPS_PER_EPOCH, SWITCH, edit_json, metrics, outcome, tensors, train_here
from trainer import loop
from trainer.checkpoint import read_state
from trainer.checkpoint.files import seal
from trainer.curriculum import Curriculum, CurriculumRecord, StageConfig
from trainer.errors import UserError
from trainer.losses import LossConfig
from trainer.optimizer import OptimConfig


class Died(Exception):
    """Ends a run without a word, as a kill would."""


def dies(folder: Path, data: Path, step: int, monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    """Train until right before update `step`."""
    original = loop.to_micro_batch

    def to_micro_batch(run, rows):
        if run.state.step == step:
            raise Died
        return original(run, rows)

    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(loop, "to_micro_batch", to_micro_batch)
        train_here(folder, data, "checkpoint.asynchronous=false", *settings)


def forget(folder: Path) -> None:
    """Make the newest checkpoint one that knows nothing of curricula, as older versions wrote them."""
    root = folder / "run" / "checkpoints"
    path = root / (root / "latest").read_text().strip()
    state = json.loads((path / "state.json").read_text())
    del state["curriculum"], state["woken"]
    (path / "state.json").write_text(json.dumps(state))
    edit_json(path / "hashes.json", **{"state.json": seal(path / "state.json")})


@pytest.mark.parametrize("old", [False, True], ids=["record", "no-record"])
def test_pretrain_that_would_have_ended_before_the_checkpoint(
    old: bool, small_data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    dies(tmp_path, small_data, 16, monkeypatch)
    if old:
        forget(tmp_path)
    assert train_here(tmp_path, small_data, "stages.0.epochs=1") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "at step 14" in line and "stages." in line and "what is past cannot change" in line
    # Ending it where the run stands is honoured, and the concept slots wake up there.
    settings = ["stages.0.epochs=null", "stages.0.steps=14"]
    assert train_here(tmp_path, small_data, *settings) == 0
    assert outcome(tmp_path)["steps"] == 14 + 2 * STEPS_PER_EPOCH
    assert [line["stage"] for _, line in sorted(metrics(tmp_path).items())][13:15] == ["pretrain", "align"]
    assert tensors(tmp_path)["dictionary/concepts/W_enc"].norm() > 1


def test_the_end_of_a_curriculum_moves(small_data: Path, tmp_path: Path, caplog, capsys) -> None:
    caplog.set_level(logging.INFO)
    assert train_here(tmp_path, small_data) == 0
    assert train_here(tmp_path, small_data, "stages.1.epochs=1") == 2
    assert "stages end after 30 steps, but the checkpoint is at step 40" in capsys.readouterr().err
    assert train_here(tmp_path, small_data, "stages.1.epochs=3", "optim.lr=1e-3") == 0
    assert outcome(tmp_path)["step"] == 50
    said = "\n".join(caplog.messages)
    assert "other stages: pretrain 0-20, align 20-50; they were pretrain 0-20, align 20-40" in said
    assert "resumed with optim.lr=0.001; it was 0.003" in said


@pytest.mark.parametrize("die_at", [SWITCH, SWITCH + 2])
def test_awake_is_a_fact_of_the_state(die_at: int, small_data: Path, tmp_path: Path, monkeypatch) -> None:
    settings = ["checkpoint.every=1", "checkpoint.asynchronous=false"]
    dies(tmp_path, small_data, die_at, monkeypatch, *settings)
    state = read_state(tmp_path / "run" / "checkpoints" / f"step-{die_at:08d}")
    assert state.woken is (die_at > SWITCH) and state.curriculum == CurriculumRecord(["pretrain", "align"], [0, 20], 40)
    if die_at > SWITCH:
        monkeypatch.setattr(loop, "wake_concepts", lambda run: pytest.fail("woken twice"))
    assert train_here(tmp_path, small_data, *settings) == 0


def curriculum(*stages: tuple[str, int]) -> Curriculum:
    configs = [StageConfig(name, steps=steps) for name, steps in stages]
    return Curriculum(configs, LossConfig(), OptimConfig(), [5] * len(configs))


@pytest.mark.parametrize(
    "stages,step,stage,awake,problem",
    [
        ([("pretrain", 10), ("align", 10)], 7, "pretrain", False, ""),
        ([("pretrain", 7), ("align", 1)], 7, "pretrain", False, ""),
        ([("pretrain", 30)], 7, "pretrain", False, ""),
        ([("pretrain", 7)], 7, "pretrain", False, ""),
        ([("pretrain", 10), ("align", 5)], 15, "align", True, ""),
        ([("pretrain", 10), ("align", 5), ("align", 9)], 15, "align", True, ""),
        ([("align", 10)], 0, "", False, ""),
        ([("pretrain", 6), ("align", 10)], 7, "pretrain", False, "stages.1 is align from step 6"),
        ([("pretrain", 6)], 7, "pretrain", False, "stages end after 6 steps"),
        ([("align", 20)], 7, "pretrain", False, "stages.0 is align from step 0"),
        ([("pretrain", 14), ("align", 5)], 15, "align", True, "stages.1"),
        ([("pretrain", 20)], 15, "align", True, "stages.1"),
        ([("pretrain", 15), ("align", 5)], 15, "align", True, "stages.1"),
        ([("pretrain", 4), ("pretrain", 6), ("align", 9)], 15, "align", True, "stages.1"),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["record", "no-record"])
def test_what_may_change(known: bool, stages, step: int, stage: str, awake: bool, problem: str) -> None:
    record = curriculum(("pretrain", 10), ("align", 10)).record() if step else None
    new = curriculum(*stages)
    if (not known and len(stages) == 3 and stages[1][0] == "pretrain") or (not known and stages[0] == ("pretrain", 14)):
        return  # without a record only the stage of the last step is known
    if not problem:
        new.refuse_other_past(step, stage, awake, record if known else None)
        return
    with pytest.raises(UserError) as caught:
        new.refuse_other_past(step, stage, awake, record if known else None)
    if known:
        assert problem in str(caught.value)


def test_all_checkpoints_damaged_stops(small_data: Path, tmp_path: Path, capsys) -> None:
    assert train_here(tmp_path, small_data) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        with (folder / "dictionary" / "bank-00000.safetensors").open("r+b") as file:
            file.seek(200)
            file.write(b"\xff\xfe\xfd")
    assert train_here(tmp_path, small_data) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no checkpoint of" in said and "start anew with another run.dir" in said and "differs from its hash" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines


def test_a_first_save_that_was_killed_does_not_stop(small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000007" / "dictionary").mkdir(parents=True)
    assert train_here(tmp_path, small_data) == 0
