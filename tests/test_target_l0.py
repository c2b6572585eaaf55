"""dictionary.target_l0: the weight of sparsity follows until the mean L0 is there."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.support.runs import TOTAL, assert_same, metrics, tensors, train_here
from trainer.following import LEAST_SPARSITY, MOST_SPARSITY, SPARSITY_RATE, followed_sparsity

TARGET, BEGUN, WEIGHT = 5.0, 6, 0.05
CHANGES = {
    "dictionary": {"target_l0": TARGET, "k_fall": 8, "initial_l0": BEGUN},
    "loss": {"sp": WEIGHT},
    "checkpoint": {"every": 10, "keep": 9},
    "revival": {"method": "none"},
}


def followed(factor: float, l0: float, target: float) -> float:
    return float(
        followed_sparsity(torch.tensor(factor, dtype=torch.float64), torch.tensor(l0, dtype=torch.float64), target)
    )


def test_the_factor_rises_above_the_target_and_falls_below_it() -> None:
    assert followed(2.0, 32.0, 32.0) == 2.0
    assert followed(2.0, 40.0, 32.0) == pytest.approx(2.0 * math.exp(SPARSITY_RATE * 0.25))
    assert followed(2.0, 0.0, 32.0) == pytest.approx(2.0 * math.exp(-SPARSITY_RATE))
    assert followed(2.0, 500.0, 32.0) == pytest.approx(2.0 * math.exp(SPARSITY_RATE))  # by no more a step
    assert followed(MOST_SPARSITY, 500.0, 32.0) == MOST_SPARSITY
    assert followed(LEAST_SPARSITY, 0.0, 32.0) == LEAST_SPARSITY


def test_the_weight_of_each_step_is_that_of_the_steps_before_it(small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path, small_data, changes=CHANGES | {"stages": [{"name": "pretrain", "steps": TOTAL}]}) == 0
    lines, factor = metrics(tmp_path), 1.0
    for step, line in lines.items():
        assert line["sp_weight"] == pytest.approx(WEIGHT * factor, rel=1e-12)
        left = max(0.0, 1.0 - (step - 1) / 8)
        factor = followed(factor, line["l0"], TARGET * (BEGUN / TARGET) ** left)
    assert len({line["sp_weight"] for line in lines.values()}) > TOTAL / 2
    state = json.loads((tmp_path / "run/checkpoints" / f"step-{TOTAL:08d}" / "state.json").read_text())
    assert state["sparsity"] == pytest.approx(factor, rel=1e-12)


def test_a_resumed_run_goes_on_with_the_weight(small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path / "whole", small_data, changes=CHANGES) == 0
    saved = tmp_path / "whole/run/checkpoints/step-00000010"
    assert json.loads((saved / "state.json").read_text())["sparsity"] != 1.0
    assert train_here(tmp_path / "resumed", small_data, f"checkpoint.resume={saved}", changes=CHANGES) == 0
    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "resumed"))
    weights = [{step: line["sp_weight"] for step, line in metrics(tmp_path / x).items()} for x in ("whole", "resumed")]
    assert weights[1] == {step: weight for step, weight in weights[0].items() if step > 10}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dictionary.gate=batch_topk", "dictionary.k=4"], "set dictionary.k"),
        (["dictionary.target_l0=1000"], "free slots"),
        (["dictionary.target_l0=-1"], "free slots"),
        (["loss.sp=0"], "set loss.sp"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    overrides: list[str], message: str, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys
) -> None:
    assert train_here(tmp_path, small_data, *overrides, changes=CHANGES) != 0
    assert message in capsys.readouterr().err + caplog.text
