"""`alignsae swap` with other dictionaries and texts beside the slots, as a user types it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.language_model import words
from tools.cli import main
from tools.swapping.table import methods_of


def swapped(tiny_run: Path, out: Path, *arguments: str) -> int:
    source = ["--run", str(tiny_run / "aligned"), "--model", str(tiny_run / "lm"), "--out", str(out)]
    few = ["--prompts", str(tiny_run / "prompts.jsonl"), "--alphas", "1,2", "--pairs", "12", "--match", "first"]
    return main(["swap", *source, *few, *arguments])


def test_other_dictionaries_and_texts_stand_beside_the_slots(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    drawn = random.Random(0)
    texts = [{"body": " ".join(drawn.choices(words()[2:], k=20))} for _ in range(5)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in texts))
    beside = ["--beside", f"twin={tiny_run / 'aligned'}", "--unsupervised", str(tiny_run / "plain")]
    text = ["--texts", str(tmp_path / "texts.jsonl"), "--field", "body"]
    assert swapped(tiny_run, tmp_path / "swap.json", "--rivals", "erasure", *beside, *text) == 0
    found = json.loads((tmp_path / "swap.json").read_text())
    methods = methods_of(found)
    assert [*methods] == ["slots", "mean_difference", "erasure", "unsupervised", "twin"]
    assert found["bystanders"]["texts"] == 5
    for part in methods.values():
        for form in part["forms"].values():
            assert form["text_kl"] >= 0 and 0 < form["fluency"] <= 1
        assert part["best_success"] == part["forms"]["always"]["success"]
    slots, twin = methods["slots"], methods["twin"]
    assert twin.pop("slots_over")["always"] == {
        "success": {"difference": 0, "standard_error": 0},
        "joint": {"difference": 0, "standard_error": 0},
    }
    assert twin == slots
    printed = capsys.readouterr().out
    assert "slots over twin: 0.000 (0.000)" in printed and "5 texts" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rivals", "probe,magic"], "'magic' is none of probe"),
        (["--rivals", "das_0"], "'das_0' is none of"),
        (["--beside", "aligned"], "is no"),
        (["--beside", "slots=RUN"], "there is a method called slots already"),
        (["--beside", "probe=RUN"], "there is a method called probe already"),
        (["--beside", "a=RUN", "--beside", "a=RUN"], "there is a method called a already"),
        (["--rivals", "das_33"], "the activations have 32 dimensions"),
        (["--learn-steps", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tiny_run: Path, tmp_path: Path, capsys: Any, arguments: list[str], said: str
) -> None:
    filled = [argument.replace("RUN", str(tiny_run / "aligned")) for argument in arguments]
    assert swapped(tiny_run, tmp_path / "swap.json", *filled) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("alignsae: error")]
    assert len(errors) == 1 and said in errors[0], errors
    assert not (tmp_path / "swap.json").exists()
