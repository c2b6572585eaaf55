"""An experiment as a list of commands: what is done is not done again, what fails is gone on with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.cli import main
from tools.reproducing.pages import PAPER, ROWS, horizon, markdown
from tools.reproducing.stages import Stage, run_stages

PEOPLE = ["biographies", "--persons", "3", "--out"]


def test_stages_that_are_done_are_not_run_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stages.json"
    first = Stage("first", [*PEOPLE, str(tmp_path / "a")])
    broken = Stage("second", ["biographies", "--persons", "0", "--out", str(tmp_path / "b")])
    assert run_stages([first, broken], path) == 2
    assert set(json.loads(path.read_text())) == {"first"}
    # `biographies` refuses a folder that is there: it would fail if it were run again.
    assert run_stages([first, Stage("second", [*PEOPLE, str(tmp_path / "b")])], path) == 0
    assert set(json.loads(path.read_text())) == {"first", "second"}
    assert "second ended with exit code 2" in capfd.readouterr().err


def test_other_settings_than_those_it_was_begun_with_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stages.json").write_text(json.dumps({"biographies": {"command": "alignsae other", "seconds": 1.0}}))
    assert main(["reproduce", "paper", "--scale", "tiny", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "biographies was made by `alignsae other`" in error and error.count("\n") == 1


@pytest.mark.parametrize(("layers", "problem"), [("0,2", "blocks 0 to 1"), ("a", "neither `all` nor block indices")])
def test_layers_that_the_model_lacks(
    layers: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "paper", "--scale", "tiny", "--layers", layers, "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_tables_hold_every_figure() -> None:
    row = dict.fromkeys(ROWS, 0.5) | {"alpha": 2.0, "swap_error": 0.01, "alphas": {"1.0": 0.4, "2.0": 0.5}}
    row["category_kept_of_failures"] = None  # no swap failed
    row["categories"] = {"1.0": 0.25, "2.0": None}
    layers = {3: row, 4: row | {"swap": 0.75}}
    text = markdown({"best_layer": 4, "layers": layers, "answer_accuracy": 0.9, "seconds": {"swaps, layer 3": 12.3}})
    assert "| swaps that succeed | 0.846 | 0.75 ± 0.01 |" in text
    assert "| failed swaps that keep the category | 0.747 | - |" in text
    assert "| 3 | 0.250 | - |" in text
    assert "| 3 | 0.400 | 0.500 |" in text and "| swaps, layer 3 | 12 |" in text
    assert set(PAPER) <= set(ROWS)
    assert len(horizon({"best_layer": 4, "layers": layers}).axes[0].lines) == 5


@pytest.mark.slow
def test_the_whole_experiment_in_small(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.cli", "reproduce", "paper", "--scale", "tiny", "--layers", "1"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, timeout=300)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["best_layer"] == "1" and list(found["layers"]) == ["1"]
    assert set(found["layers"]["1"]) >= set(ROWS)
    assert (tmp_path / "results.md").read_text().startswith("Layer 1")
    again = subprocess.run([*command, "--out", str(tmp_path)], check=True, timeout=60, stdout=subprocess.PIPE)
    assert b"==" not in again.stdout, "a stage was run again"
