"""Runs whose device works a step ahead of what the host knows, as on CUDA: the same figures, the same resume."""

import shutil
from pathlib import Path

import pytest

from tests.support.runs import TOTAL, assert_same, metrics, outcome, tensors, train_here
from trainer.topology import Topology

CHANGES = {
    "dictionary": {"gate": "batch_topk", "k": 5, "k_fall": 8, "initial_l0": 8},
    "guard": {"spike": 20.0, "window": 4},
    "checkpoint": {"every": 10, "keep": 9},
    "kernel": "auto",
}


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Topology, "lag", 1)


def test_figures_are_those_of_a_run_that_waits(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_here(tmp_path / "waits", small_data, changes=CHANGES) == 0
    monkeypatch.setattr(Topology, "lag", 1)
    assert train_here(tmp_path / "ahead", small_data, changes=CHANGES) == 0
    waits, ahead = metrics(tmp_path / "waits"), metrics(tmp_path / "ahead")
    assert waits.keys() == ahead.keys() and len(waits) == TOTAL
    for step in (*range(1, 6), TOTAL):
        for figure in ("loss", "fvu", "l0", "grad_norm"):
            assert ahead[step][figure] == pytest.approx(waits[step][figure], rel=1e-2), (step, figure)


@pytest.mark.usefixtures("ahead")
def test_a_resumed_run_ends_bitwise_where_the_whole_one_does(small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path / "whole", small_data, changes=CHANGES) == 0
    saved = tmp_path / "whole/run/checkpoints/step-00000010"
    shutil.copytree(saved, tmp_path / "saved")
    resumed = train_here(tmp_path / "resumed", small_data, f"checkpoint.resume={tmp_path / 'saved'}", changes=CHANGES)
    assert resumed == 0
    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "resumed"))
    assert metrics(tmp_path / "whole")[TOTAL]["loss"] == metrics(tmp_path / "resumed")[TOTAL]["loss"]


@pytest.mark.usefixtures("ahead")
def test_a_bad_batch_is_skipped_and_booked_a_step_later(tmp_path: Path) -> None:
    from tests.support.data import write_data

    data = write_data(tmp_path / "data", factors={100: 3e4})
    changes = CHANGES | {"dictionary": {"gate": "relu"}, "data": {"max_norm": 0.0}}
    assert train_here(tmp_path, data, changes=changes) == 0
    assert outcome(tmp_path)["status"] == "finished"
    skipped = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert skipped and "over guard.spike" in skipped[0]
