"""Slots of a run stay alive, without shocks: its FVU from one log interval to the next, its dead slots, its twins."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import STEPS_PER_EPOCH, metrics, train_here
from trainer.checkpoint import load_dictionary

EVERY, SWITCH, STEPS, LOGGED = 20, 80, 160, 10
CHANGES: dict[str, Any] = {
    "run": {"log_every": LOGGED},
    "dictionary": {"initial_l0": 6, "k": 4, "k_fall": 0},
    "stages": [{"name": "pretrain", "steps": SWITCH}, {"name": "align", "steps": STEPS - SWITCH}],
    "revival": {"every": EVERY, "dead_after": STEPS_PER_EPOCH, "until": 0.8},
    "checkpoint": {"every": 0},
}
# What kills slots on these rows, but for relu, which lets them live.
GATES = {
    "relu": ["loss.sp=0.2", "optim.lr=0.03"],
    "batch_topk": ["loss.sp=0", "optim.lr=0.02"],
    "jumprelu": ["loss.sp=0.05", "optim.lr=0.01"],
}


@pytest.mark.parametrize("gate", ["relu", "batch_topk", pytest.param("jumprelu", marks=pytest.mark.slow)])
def test_revivals_and_the_switch_shake_nothing(gate: str, small_data: Path, tmp_path: Path, capsys) -> None:
    assert train_here(tmp_path, small_data, f"dictionary.gate={gate}", *GATES[gate], changes=CHANGES) == 0
    revivals = capsys.readouterr().out.count("dead slots got new weights")
    lines = metrics(tmp_path)
    ratios = {step: lines[step + LOGGED]["fvu"] / lines[step]["fvu"] for step in range(EVERY, STEPS, EVERY)}
    assert SWITCH in ratios and max(ratios.values()) <= 1.5, ratios
    assert (revivals == 0 and lines[STEPS]["dead"] <= 0.02) if gate == "relu" else revivals >= 2
    dictionary, _ = load_dictionary(tmp_path / "run")
    for name in ("W_enc", "W_dec"):
        rows = torch.cat([getattr(bank, name).detach() for bank in dictionary.free_banks()])
        assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.mark.slow
def test_dead_slots_are_pulled_back(small_data: Path, tmp_path: Path) -> None:
    chosen = ["dictionary.gate=jumprelu", *GATES["jumprelu"], "revival.method=none"]
    ends = []
    for weight in (0.0, 0.05):
        folder = tmp_path / str(weight)
        assert train_here(folder, small_data, *chosen, f"loss.pull={weight}", changes=CHANGES) == 0
        ends.append(metrics(folder)[STEPS])
    without, pulled = ends
    assert pulled["dead"] < without["dead"] / 2 and pulled["fvu"] < without["fvu"]
