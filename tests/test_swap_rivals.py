"""`alignsae swap` with other dictionaries and texts beside the slots, as a user types it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.language_model import CONCEPTS, words
from tools.cli import main
from tools.swapping import methods
from tools.swapping.table import methods_of
from trainer import load
from trainer.analysis.rivals import lesson_loss
from trainer.analysis.steering import SlotEdit


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
    by_name = methods_of(found)
    assert [*by_name] == ["slots", "mean_difference", "erasure", "unsupervised", "twin"]
    assert found["bystanders"]["texts"] == 5
    for part in by_name.values():
        for form in part["forms"].values():
            assert form["text_kl"] >= 0 and 0 < form["fluency"] <= 1
        assert part["best_success"] == part["forms"]["always"]["success"]
    slots, twin = by_name["slots"], by_name["twin"]
    assert twin.pop("slots_over")["always"] == {
        "success": {"difference": 0, "standard_error": 0},
        "joint": {"difference": 0, "standard_error": 0},
    }
    assert twin == slots
    printed = capsys.readouterr().out
    assert "slots over twin: 0.000 (0.000)" in printed and "5 texts" in printed


def test_rows_that_were_learned_are_exported_and_steered_with(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    rows, run = tmp_path / "rows.safetensors", tiny_run / "aligned"
    learning = ["--rivals", "slots_learned", "--learn-steps", "3", "--learned", str(rows)]
    assert swapped(tiny_run, tmp_path / "swap.json", *learning) == 0
    learned = load_file(rows)["W_write"]
    found = json.loads((tmp_path / "swap.json").read_text())
    lead = found["rivals"]["slots_learned"]["over_mean_difference"]["always"]["success"]["difference"]
    parts = (found["rivals"]["slots_learned"], found["mean_difference"])
    assert lead == pytest.approx(parts[0]["best_success"] - parts[1]["best_success"])
    assert f"slots_learned over mean_difference: {lead:.3f}" in capsys.readouterr().out
    export = ["export", "--run", str(run), "--format", "safetensors", "--written", str(rows)]
    for norm in ([], ["--unit-norm"]):
        out = tmp_path / f"export{len(norm)}"
        assert main([*export, *norm, "--out", str(out)]) == 0
        found = load(out)
        ones = torch.tensor([[found.gains[name] for name in CONCEPTS]])
        writes = SlotEdit(found.dictionary, range(3), "set", ones, "cpu").rows * ones.T
        own = torch.tensor([load(run).gains[name] for name in CONCEPTS])[:, None]
        torch.testing.assert_close(writes, learned * own, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(SlotEdit(load(run).dictionary, range(3), "set", ones, "cpu").rows, learned, rtol=1e-3)
    save_file({"W_write": torch.zeros(3, 5)}, rows)
    assert main([*export, "--out", str(tmp_path / "wrong")]) == 2 and not (tmp_path / "wrong").exists()
    assert "W_write has shape (3, 5)" in capsys.readouterr().err


def test_of_several_rates_the_validation_swaps_choose(tiny_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    tried: list[float] = []

    def loss(*given: Any) -> float:
        tried.append(lesson_loss(*given))
        return tried[-1]

    monkeypatch.setattr(methods, "lesson_loss", loss)
    rates = [0.001, 0.1, 30.0]
    learning = ["--rivals", "das_1,slots_learned", "--learn-steps", "4", "--learn-rates", ",".join(map(str, rates))]
    assert swapped(tiny_run, tmp_path / "swap.json", *learning) == 0
    found = json.loads((tmp_path / "swap.json").read_text())["learn_rates"]
    expected = [rates[losses.index(min(losses))] for losses in (tried[:3], tried[3:])]
    assert [found[name] for name in ("das_1", "slots_learned")] == expected and len({*tried}) == 6


def test_with_texts_to_learn_with_rows_are_learned_that_move_less(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    drawn = random.Random(0)
    for name in ("reported", "learned"):
        texts = [{"text": " ".join(drawn.choices(words()[2:], k=20))} for _ in range(6)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, texts)))
    learning = ["--rivals", "slots_learned", "--learn-steps", "20", "--learn-rates", "0.3", "--texts"]
    learning.append(str(tmp_path / "reported"))
    found = []
    for more in ([], ["--learn-texts", str(tmp_path / "learned")]):
        assert swapped(tiny_run, tmp_path / "swap.json", *learning, *more) == 0
        found.append(json.loads((tmp_path / "swap.json").read_text()))
    assert [one["learning"]["texts"] for one in found] == [0, 3] and found[1]["learning"]["questions"] > 0
    said = f"leaving {found[1]['learning']['questions']} other questions and 3 texts alone"
    assert said in capsys.readouterr().out
    loud, quiet = (one["rivals"]["slots_learned"] for one in found)
    assert quiet["forms"]["always"]["text_kl"] < loud["forms"]["always"]["text_kl"]
    assert [row["alpha"] for row in quiet["alphas"]] == [quiet["best_alpha"]] == [1]
    assert [row["alpha"] for row in loud["alphas"]] == [1, 2]
    (tmp_path / "learned").write_text(json.dumps(texts[0]))
    assert swapped(tiny_run, tmp_path / "none.json", *learning, "--learn-texts", str(tmp_path / "learned")) == 2
    assert "one text that is long enough" in capsys.readouterr().err and not (tmp_path / "none.json").exists()


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
        (["--learn-rates", "0.01,0"], "--learn-rates must be above 0"),
        (["--texts", "RUN/config.yaml", "--learn-texts", "RUN/config.yaml"], "cannot be reported by --texts, too"),
        (["--rivals", "probe", "--learn-texts", "RUN/config.yaml"], "add slots_learned or das to --rivals"),
        (["--rivals", "none", "--learned", "rows.safetensors"], "slots_learned learned; add it to --rivals"),
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
