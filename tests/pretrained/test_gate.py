"""`alignsae gate`: a threshold and a gain for a relu run, fitted without training."""

import re
from pathlib import Path

import pytest

from tests.support.data import write_data
from tests.support.runs import arguments, metrics
from tools.cli import main
from trainer import pretrained, train
from trainer.checkpoint import load_dictionary

L0 = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data, the run `run` of relu, and what `alignsae gate` printed and wrote for it."""
    folder = tmp_path_factory.mktemp("gate")
    write_data(folder / "data", concepts=[])
    changes = {"stages": [{"name": "pretrain", "steps": 120}], "loss": {"sp": 0.3}}
    assert train.main(arguments(folder, folder / "data", changes=changes)) == 0
    return folder


def gate(run: Path, out: Path, *more: str) -> int:
    data = str(run / "data")
    return main(
        ["gate", str(run / "run"), "--l0", str(L0), "--rows", data, "--heldout", data, "--out", str(out), *more]
    )


def figures(shown: str) -> dict[str, tuple[float, float]]:
    """L0 and FVU by the rows they are of."""
    found = re.findall(r"^(.+): L0 ([\d.]+), FVU ([\d.]+) on", shown, re.MULTILINE)
    return {name: (float(l0), float(fvu)) for name, l0, fvu in found}


def test_the_l0_is_met_and_the_fvu_is_that_of_the_best_gain(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert gate(run, tmp_path / "gated") == 0
    found = figures(capsys.readouterr().out)
    assert found["as it was"][0] > L0
    assert found["fitted rows"][0] == pytest.approx(L0, abs=0.01)
    assert found["held-out rows"] == found["fitted rows"]  # they are the same rows
    rows = pretrained.sample(str(run / "data"))
    dictionary, mean = pretrained.load(tmp_path / "gated"), rows.mean(dim=0)
    assert dictionary.form.gate == "batch_topk" and dictionary.form.k == L0

    def fvu(gain: float) -> float:
        given = sum(bank.decode(gain * bank.encode(rows)) for bank in dictionary.free_banks())
        return float((rows - dictionary.output(given)).square().sum() / (rows - mean).square().sum())

    assert fvu(1.0) == pytest.approx(found["fitted rows"][1], abs=1e-4)
    assert fvu(1.0) < min(fvu(0.9), fvu(1.1))


def test_a_run_begins_with_it(run: Path, tmp_path: Path) -> None:
    assert gate(run, tmp_path / "gated") == 0
    changes = {"stages": [{"name": "pretrain", "steps": 2}]}
    start = f"dictionary.start_from={tmp_path / 'gated'}"
    assert train.main(arguments(tmp_path, run / "data", start, changes=changes)) == 0
    assert metrics(tmp_path)[1]["l0"] == pytest.approx(L0, abs=1.0)
    dictionary, _ = load_dictionary(tmp_path / "run")
    thresholds = [bank.weights().threshold for bank in dictionary.free_banks()]
    assert thresholds and all(t is not None and len(t.unique()) == 1 for t in thresholds)


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--l0", "39"], "give an --l0 below that"), (["--l0", "0"], "at least 1"), (["--rows", "/nowhere"], "/nowhere")],
)
def test_what_cannot_be_fitted_is_refused(
    run: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert gate(run, tmp_path / "gated", *more) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_thresholds_and_concept_slots_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gate(run, tmp_path / "gated") == 0
    stages = {"stages": [{"name": "pretrain", "steps": 1}, {"name": "align", "steps": 1}]}
    write_data(tmp_path / "labelled")
    assert train.main(arguments(tmp_path / "aligned", tmp_path / "labelled", changes=stages)) == 0
    start = [f"dictionary.start_from={tmp_path / 'gated'}"]
    again = {"stages": [{"name": "pretrain", "steps": 1}]}
    assert train.main(arguments(tmp_path / "again", run / "data", *start, changes=again)) == 0
    for source, message in (("aligned", "awake"), ("again", "thresholds already")):
        command = ["gate", str(tmp_path / source / "run"), "--l0", "2", "--rows", str(run / "data")]
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
