"""docs/your-own-data.md: its rows and commands, word for word, on a tiny model; training and steering cut short."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.support.language_model import save_model_of
from tools.cli import main
from trainer import load
from trainer.stream import Manifest
from trainer.train import main as train

ROOT = Path(__file__).parents[1]
SHORT = ["stages.0.steps=10", "stages.1.steps=10", "data.global_batch=64", "tracking.uri=off"]


def blocks(kind: str) -> list[str]:
    text = (ROOT / "docs" / "your-own-data.md").read_text()
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.slow
def test_the_example_runs_from_text_to_steering(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (lines,) = blocks("json")
    rows = [json.loads(line) for line in lines.splitlines()]
    save_model_of([row["text"] for row in rows], tmp_path / "models/mine")
    (tmp_path / "rows.jsonl").write_text(lines * 20)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert [words[1] for words in commands] == [
        *("extract", "verify", "init", "train", "evaluate", "steer", "explore", "report", "export"),
    ]
    for program, name, *arguments in commands:
        assert program == "alignsae"
        # The launcher of `alignsae train` has tests of its own.
        ended = train([*arguments, *SHORT]) if name == "train" else main([name, *arguments])
        assert ended == 0, capsys.readouterr().err
    manifest = Manifest.load(tmp_path / "data/own/layer-01/train")
    assert manifest.concepts == ["place", "month"]
    result = json.loads((tmp_path / "runs/own/evaluation.json").read_text())
    assert {"train", "heldout"} <= set(result)
    assert "'The train leaves'" in capsys.readouterr().out
    assert (tmp_path / "runs/own/slot-pages/index.html").is_file() and (tmp_path / "runs/own/report.html").is_file()
    assert load(tmp_path / "exported/own").concepts == ["place", "month"]
