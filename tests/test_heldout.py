"""Held-out rows during training: their figures, that they change nothing, and the checkpoint that is the best."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.data import write_data
from tests.support.runs import (
    arguments,
    assert_same,
    digests,
    edit_json,
    metrics,
    outcome,
    tensors,
    train_here,
)
from tests.test_train import Killed, at_step, die, refusal
from trainer import load, train
from trainer.analysis.evaluation import concept_slot_means, evaluate_split
from trainer.analysis.results import rows_of
from trainer.checkpoint import load_dictionary, read_state, saver
from trainer.heldout import evaluations
from trainer.heldout.rows import MOST_BLOCKS, chosen_rows

EVERY, TOTAL = 6, 40
EVALUATIONS = [6, 12, 18, 24, 30, 36, TOTAL]
SETTINGS = [f"run.evaluate_every={EVERY}", "data.heldout_rows=0", "checkpoint.keep=1"]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that list up to two concepts, have none, or are unknown. Their directions are not those of the training
    rows, so that slots do no better on them in the end than at first."""
    return write_data(tmp_path_factory.mktemp("heldout") / "heldout", rows=150, several=True)


def trained(folder: Path, data: Path, heldout: Path, *overrides: str) -> int:
    return train_here(folder, data, f"data.heldout={heldout}", *SETTINGS, *overrides)


@pytest.fixture(scope="module")
def evaluated(small_data: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best checkpoint is its first that counts."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert trained(folder, small_data, heldout, "checkpoint.best=heldout/auroc") == 0
    return folder


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in (folder / "run" / "checkpoints").iterdir()}


def heldout_lines(folder: Path) -> dict[int, dict[str, Any]]:
    """The figures of held-out rows in metrics.jsonl, by step."""
    found = {s: {k: v for k, v in line.items() if k.startswith("heldout/")} for s, line in metrics(folder).items()}
    return {step: figures for step, figures in found.items() if figures}


def test_evaluations_change_nothing(evaluated: Path, small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path, small_data) == 0
    assert_same(tensors(tmp_path), tensors(evaluated))
    assert digests(tmp_path) == digests(evaluated)


def test_figures_are_those_of_the_tool(evaluated: Path, heldout: Path) -> None:
    lines = heldout_lines(evaluated)
    assert list(lines) == EVALUATIONS
    assert set(lines[18]) == {"heldout/fvu", "heldout/l0"}  # concept slots wake up after step 20
    dictionary, _ = load_dictionary(evaluated / "run")
    rows, sources = rows_of([str(heldout)], dictionary)
    found = evaluate_split(dictionary, rows, sources.manifest.concepts)
    expected = {
        "fvu": found["reconstruction"]["fvu"],
        "l0": found["reconstruction"]["l0"],
        "slot_accuracy": found["binding"]["slot_accuracy"],
        "auroc": found["labels"]["auroc"],
        "average_precision": found["labels"]["mean_average_precision"],
        "text_auroc": found["text"]["auroc"],
        "text_firing": found["text"]["concept_firing_rate"],
        "text_any_firing": found["text"]["any_concept_firing_rate"],
        "text_activation": found["text"]["concept_activation"],
    }
    assert lines[TOTAL].keys() == {f"heldout/{name}" for name in expected}
    for name, value in expected.items():
        assert lines[TOTAL][f"heldout/{name}"] == pytest.approx(value, rel=1e-5), name


def test_the_best_checkpoint_outlives_later_ones(evaluated: Path) -> None:
    values = {step: line["heldout/auroc"] for step, line in heldout_lines(evaluated).items() if step > 20}
    assert max(values, key=lambda step: values[step]) == 24
    assert checkpoints(evaluated) == {"latest", "best", "step-00000024", "step-00000040"}
    state = read_state(evaluated / "run" / "checkpoints" / "step-00000040")
    assert state.best is not None
    assert (state.best.metric, state.best.step, state.best.value) == ("heldout/auroc", 24, values[24])
    dictionary, _ = load_dictionary(evaluated / "run" / "checkpoints" / "best")
    assert torch.equal(dictionary.concepts.W_enc, tensors(evaluated, "step-00000024")["dictionary/concepts/W_enc"])
    assert outcome(evaluated)["best"] == vars(state.best)


@pytest.mark.parametrize("figure", ["auroc", "text_firing"])
def test_of_equally_good_checkpoints_the_last_is_the_best(
    figure: str, small_data: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a worse one comes between."""
    worse = iter([False, False, False, True] * 10)
    found = {"auroc": (1.0, 0.5), "text_firing": (0.0, 0.5)}[figure]
    monkeypatch.setattr(evaluations, "heldout_figures", lambda *args: {f"heldout/{figure}": found[next(worse)]})
    assert trained(tmp_path, small_data, heldout, f"checkpoint.best=heldout/{figure}") == 0
    assert (tmp_path / "run" / "checkpoints" / "best").read_text().strip() == f"step-{TOTAL:08d}"
    assert [line[f"heldout/{figure}"] for line in heldout_lines(tmp_path).values()].count(0.5) == 1


def test_the_best_checkpoint_is_steered_with_in_units_of_its_own(evaluated: Path, small_data: Path) -> None:
    found = load(evaluated / "run" / "checkpoints" / "best")
    rows, _ = rows_of([str(small_data)], found.dictionary)
    means = concept_slot_means(found.dictionary, rows).tolist()
    assert list(found.gains.values()) == pytest.approx(means, rel=0.1)  # an epoch leaves rows out
    assert found.gains != load(evaluated / "run").gains


@pytest.mark.parametrize("step", [pytest.param(24, marks=pytest.mark.slow), 33])
def test_a_resumed_run_is_that_of_an_undisturbed_one(
    step: int, evaluated: Path, small_data: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, step, die)
    with pytest.raises(Killed):
        trained(tmp_path, small_data, heldout, "checkpoint.best=heldout/auroc")
    assert trained(tmp_path, small_data, heldout, "checkpoint.best=heldout/auroc") == 0
    assert_same(tensors(tmp_path), tensors(evaluated))
    assert heldout_lines(tmp_path) == heldout_lines(evaluated)
    assert checkpoints(tmp_path) == checkpoints(evaluated)


@pytest.mark.slow
def test_another_figure_or_a_lost_checkpoint_begins_anew(
    small_data: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 33, die)
    with pytest.raises(Killed):
        trained(tmp_path, small_data, heldout, "checkpoint.best=heldout/auroc")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000024")
    at_step(monkeypatch, 37, die)
    with pytest.raises(Killed):
        trained(tmp_path, small_data, heldout, "checkpoint.best=heldout/auroc")
    assert (tmp_path / "run" / "checkpoints" / "best").read_text().strip() == "step-00000030"
    assert trained(tmp_path, small_data, heldout, "checkpoint.best=heldout/fvu") == 0
    assert checkpoints(tmp_path) == {"latest", "best", "step-00000040"}  # which improves all the time


def test_a_best_checkpoint_that_was_not_saved_is_not_the_best(
    small_data: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = saver.seal

    def full(path: Path) -> dict[str, Any]:
        if "step-00000024" in str(path):
            raise OSError(28, "No space left on device")
        return original(path)

    monkeypatch.setattr(saver, "seal", full)
    assert trained(tmp_path, small_data, heldout, "checkpoint.best=heldout/auroc") == 0
    assert (tmp_path / "run" / "checkpoints" / "best").read_text().strip() == "step-00000030"


def test_rows_are_spread_over_blocks() -> None:
    sizes = np.array([20] * 100)
    everything = [(block, rows.tolist()) for block, rows in chosen_rows(sizes, 0)]
    assert everything == [(block, list(range(20))) for block in range(100)]
    chosen = dict(chosen_rows(sizes, 64))
    assert len(chosen) == MOST_BLOCKS and {0, 99} <= chosen.keys() and sum(map(len, chosen.values())) == 64
    assert all(rows.tolist() == [0, 10] for rows in chosen.values())
    assert sum(len(rows) for _, rows in chosen_rows(sizes, 1999)) == MOST_BLOCKS * 20


def test_giant_rows_are_left_out_as_in_training(small_data: Path, tmp_path: Path) -> None:
    held = [write_data(tmp_path / name, rows=60, factors=f) for name, f in (("a", {}), ("b", {7: 1e3, 30: 1e3}))]
    short = ["stages=[{name: pretrain, steps: 2}]", "run.evaluate_every=2"]
    lines = []
    for place, data in zip(("c", "d"), held, strict=True):
        assert train_here(tmp_path / place, small_data, f"data.heldout={data}", *short) == 0
        lines.append(heldout_lines(tmp_path / place)[2])
    assert lines[0]["heldout/fvu"] == pytest.approx(lines[1]["heldout/fvu"], rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.evaluate_every=5"], ["run.evaluate_every=5 needs held-out rows", "data.heldout"]),
        (["data.heldout=HELD", "checkpoint.best=heldout/fvu"], ["checkpoint.best", "run.evaluate_every"]),
        (["EVERY", "data.heldout=HELD", "checkpoint.best=fvu"], ["checkpoint.best='fvu'", "heldout/slot_accuracy"]),
        (["EVERY", "data.heldout=HELD", "checkpoint.best=heldout/l0"], ["heldout/l0", "heldout/fvu"]),
        (["EVERY", "data.heldout=BARE", "checkpoint.best=heldout/auroc"], ["is no figure", "heldout/text_firing"]),
        (["EVERY", "data.heldout=DATA"], ["data.heldout holds rows that are trained on"]),
        (["EVERY", "data.heldout=WIDE"], ["data.heldout has width 16", "has 12"]),
        (["EVERY", "data.heldout=NAMED"], ["data.heldout names the concept 'lives'"]),
        (["EVERY", "data.heldout=ELSEWHERE"], ["data.heldout has model other", "has none"]),
        (["EVERY", "data.heldout=nowhere"], ["nowhere", "set data.heldout to the folder", "manifest.json"]),
        (["EVERY", "data.heldout=HELD", "data.heldout_rows=-1"], ["data.heldout_rows=-1"]),
        (["run.evaluate_every=-1"], ["run.evaluate_every=-1"]),
    ],
    ids=lambda value: value[-1][-24:],
)
def test_what_cannot_be_is_refused(
    overrides: list[str], words: list[str], small_data: Path, heldout: Path, tmp_path: Path, capsys: Any
) -> None:
    write_data(tmp_path / "WIDE", rows=40, width=16)
    write_data(tmp_path / "NAMED", rows=40, concepts=["born", "lives"])
    edit_json(write_data(tmp_path / "ELSEWHERE", rows=40) / "manifest.json", model="other")
    write_data(tmp_path / "BARE", rows=40, concepts=[])
    places = {name: str(tmp_path / name) for name in ("WIDE", "NAMED", "ELSEWHERE", "BARE")}
    places |= {"HELD": str(heldout), "DATA": str(small_data), "EVERY": "run.evaluate_every=5"}
    for name, text in places.items():
        overrides = [override.replace(name, text) for override in overrides]
    line = refusal(tmp_path, capsys, *arguments(tmp_path, small_data, *overrides))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_damage_in_held_out_rows_is_one_line(small_data: Path, tmp_path: Path, capsys: Any) -> None:
    held = write_data(tmp_path / "held", rows=60)
    shard = held / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    argv = arguments(tmp_path, small_data, f"data.heldout={held}", "run.evaluate_every=5", "data.quarantine_budget=9")
    assert train.main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "held/train-000000.tar: block" in line and "crc32" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
