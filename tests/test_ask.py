"""ask and swap --match: what counts as an answer, what the model knows, alpha from other prompts."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from tests.support.language_model import tiny_prompts, tiny_tokenizer
from tools import ask
from tools.cli import main
from tools.swapping import trial
from tools.swapping.choice import choose_swaps
from tools.swapping.figures import strength
from trainer.analysis.interventions import Swap, SwapScore, swap_pairs
from trainer.analysis.statistics import mean_by_subject
from trainer.errors import UserError
from trainer.language_model import RULES, SPLITS, Prompt, answer_matches, matcher, read_prompts, suggested_rule


@pytest.mark.parametrize(
    ("generated", "answer", "matching"),
    [
        (" Paris ", "Paris", {"exact", "prefix", "first"}),
        ("rome, and the official art", "rome", {"prefix", "first"}),
        ("rome art", "rome law", {"first"}),
        ("Parisian", "Paris", set()),
        ("art", "rome", set()),
    ],
)
def test_rules(generated: str, answer: str, matching: set[str]) -> None:
    tokenizer = tiny_tokenizer()
    unknown = {"first"} if "aris" in generated + answer else set()  # no word of this tokenizer: one token for all
    assert {rule for rule in RULES if matcher(rule, tokenizer)(generated, answer)} - unknown == matching - unknown


def test_the_suggested_rule_is_the_strictest_that_does() -> None:
    assert suggested_rule({"exact": 0.9, "prefix": 0.95, "first": 1.0}) == "exact"
    assert suggested_rule({"exact": 0.0, "prefix": 0.3, "first": 0.4}) == "prefix"
    assert suggested_rule({"exact": 0.0, "prefix": 0.0, "first": 0.4}) == "first"
    assert suggested_rule(dict.fromkeys(RULES, 0.0)) == ""


def test_chats_become_the_tokens_of_the_template(tmp_path: Path) -> None:
    tokenizer, path = tiny_tokenizer(), tmp_path / "chats.jsonl"
    tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}major"
    tokenizer.add_special_tokens({"bos_token": "Q"})
    chat = {"messages": [{"role": "which", "content": "ann"}], "answer": "law", "concept": "major"}
    path.write_text(json.dumps(chat) + '\n{"prompt": "Q bob"}\n')
    first, second = read_prompts(path, tokenizer)
    assert (first, second) == (Prompt("Q which ann major", "law", "major"), Prompt("Q bob"))
    with pytest.raises(UserError, match="no field 'prompt'"):
        read_prompts(path)
    begins = processors.TemplateProcessing(single="Q $A", special_tokens=[("Q", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    (first, _) = read_prompts(path, tokenizer)  # the tokenizer puts it there
    assert first.prompt == " which ann major"
    tokenizer.chat_template = "major"
    with pytest.raises(UserError, match=r"chats.jsonl:1: the tokenizer adds special tokens"):
        read_prompts(path, tokenizer)
    path.write_text('{"messages": []}\n')
    with pytest.raises(UserError, match="messages is empty"):
        read_prompts(path, tokenizer)


def answering(monkeypatch: pytest.MonkeyPatch, module: Any, answers: dict[str, str]) -> None:
    """The model says what `answers` says of a prompt."""
    monkeypatch.setattr(
        module, "generate_answers", lambda model, tokenizer, prompts, *rest: [answers[p] for p in prompts]
    )


def test_ask_scores_and_keeps_what_is_known(
    tiny_run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {p.prompt: f"{p.answer}, of course" if p.subject == "ann" else "never" for p in tiny_prompts()}
    answering(monkeypatch, ask, said)
    rows = (tiny_run / "prompts.jsonl").read_text() + '\n{"prompt": "Q", "note": 1}\n'
    (tmp_path / "p.jsonl").write_text(rows)
    command = ["ask", "--model", str(tiny_run / "lm"), "--prompts", str(tmp_path / "p.jsonl")]
    assert main([*command, "--out", str(tmp_path / "known.jsonl")]) == 0
    output = capsys.readouterr().out
    figures = {" ".join(line.split()[:-4]): line.split()[-4:] for line in output.splitlines()}
    assert figures["all"] == ["24", "0.000", "0.250", "0.250"]
    assert figures["city / which"] == ["4", "0.000", "0.250", "0.250"]
    assert "suggested: --match prefix" in output
    known = [json.loads(line) for line in (tmp_path / "known.jsonl").read_text().splitlines()]
    assert known == [row for row in map(json.loads, rows.splitlines()) if row.get("subject") == "ann"]
    assert main([*command, "--out", str(tmp_path / "none.jsonl"), "--match", "exact"]) == 2
    assert "answers none of" in capsys.readouterr().err and not (tmp_path / "none.jsonl").exists()


def test_ask_with_the_model_itself(tiny_run: Path, capsys: Any) -> None:
    assert main(["ask", "--model", str(tiny_run / "lm"), "--prompts", str(tiny_run / "prompts.jsonl")]) == 0
    assert "24" in capsys.readouterr().out


def swapped(tiny_run: Path, prompts: Path, out: Path, *arguments: str) -> int:
    source = ["--run", str(tiny_run / "aligned"), "--model", str(tiny_run / "lm"), "--prompts", str(prompts)]
    return main(["swap", *source, "--alphas", "0.5,1", "--out", str(out), *arguments])


def test_swap_takes_alpha_from_other_prompts(
    tiny_run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tiny_run / "prompts.jsonl", tmp_path / "swap.json"
    tried: list[set[str]] = []
    generate = trial.generate_edited

    def recorded(editable: Any, swaps: Any, *rest: Any, **options: Any) -> list[str]:
        tried.append({s.prompt for s in swaps})
        return generate(editable, swaps, *rest, **options)

    monkeypatch.setattr(trial, "generate_edited", recorded)
    for split, on in (("heldout", "training templates"), ("all", "other subjects")):
        tried.clear()
        assert swapped(tiny_run, prompts, out, "--split", split, "--rivals", "none") == 0
        assert "answers 0.0% of" in capsys.readouterr().err or json.loads(out.read_text())["unedited_accuracy"] >= 0.1
        result = json.loads(out.read_text())
        assert result["validation"]["on"] == on
        # Per method both alphas, then the chosen one, then suppression.
        assert len(tried) == 8 and not tried[0] & tried[2]
        assert tried[2] == tried[6] and tried[0] == tried[1] == tried[4] == tried[5]
        assert tried[3] == tried[7] <= tried[2]
        for method in ("slots", "mean_difference"):
            shares = {entry["alpha"]: entry["success"] for entry in result[method]["alphas"]}
            best = result[method]["best_alpha"]  # a smaller one that does as well would have been taken
            assert all(share < shares[best] for alpha, share in shares.items() if alpha < best)
            assert sum(map(sum, result[method]["matrix"]["swaps"])) == result["pairs"]


@pytest.mark.parametrize(
    "right, chosen",
    # Ten subjects with a swap each: at 8 of 10 the standard error is 0.13.
    [
        ((2, 8, 8, 5), 1),
        ((2, 7, 8, 8), 1),
        ((2, 6, 8, 5), 2),
        ((0, 0, 0, 0), 0.5),
        ((2, 5, 8, 10), 4),
        ((9, 9, 10, 1), 2),
    ],
)
def test_the_smallest_strength_within_a_standard_error_of_the_best(right: tuple[int, ...], chosen: float) -> None:
    swaps = [Swap(f"{i}", 0, 1, "a", "b", f"subject {i}") for i in range(10)]
    scores = {
        alpha: SwapScore(["target_answer"] * count + ["other"] * (10 - count))
        for alpha, count in zip((0.5, 1, 2, 4), right, strict=True)
    }
    assert strength(scores, swaps) == chosen
    assert strength(dict(reversed(scores.items())), swaps) == chosen
    assert strength(scores, [replace(swap, subject="one") for swap in swaps]) == (0.5, 1, 2, 4)[right.index(max(right))]


def test_validation_prompts_choose_alpha_and_training_prompts_teach() -> None:
    facts = {"city": "rome", "major": "law", "job": "smith"}
    records = [
        Prompt(f"{split} {concept}", answer, concept, split=split, subject=split)
        for split in SPLITS
        for concept, answer in facts.items()
    ]
    args = argparse.Namespace(pairs=10, seed=0, split="heldout", prompts=Path("p"))
    choice = choose_swaps(args, records, [*facts], answer_matches)
    parts = (choice.learning, choice.validation, choice.reported)
    found = [[{one.prompt.split()[0] for one in some} for some in (part.swaps, part.others)] for part in parts]
    assert found == [[{split}] * 2 for split in ("train", "validation", "heldout")]
    assert choice.on == "validation prompts"


def test_swap_with_one_subject_says_what_is_missing(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    lines = [line for line in (tiny_run / "prompts.jsonl").read_text().splitlines() if '"ann"' in line]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    assert swapped(tiny_run, tmp_path / "p.jsonl", tmp_path / "swap.json", "--split", "train") == 2
    assert "alpha needs other prompts than those that are reported" in capsys.readouterr().err
    assert not (tmp_path / "swap.json").exists()


def test_answers_that_match_each_other_are_no_swap() -> None:
    prompts = [Prompt("a", "New York", "city", subject="x"), Prompt("b", "New York City", "work", subject="x")]
    assert len(swap_pairs(prompts, ["city", "work"], split=None, pairs=5, seed=0)) == 2
    with pytest.raises(Exception, match="nothing to swap"):
        swap_pairs(prompts, ["city", "work"], split=None, pairs=5, seed=0, match=matcher("prefix", None))


def test_standard_errors_are_over_subjects() -> None:
    values = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    mean, error = mean_by_subject(values, ["a", "a", "b", "b", "c", "c"])
    assert mean == 0.5 and error == pytest.approx((2 * 1.0**2 * 3 / 2) ** 0.5 / 6)
    assert mean_by_subject(values, ["a"] * 6) == (0.5, None)
    alone = mean_by_subject(values, list("abcdef"))[1]
    assert alone == pytest.approx((0.25 / 5) ** 0.5)


def test_prompts_without_concept_or_answer_stay_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Q", "answer": null, "concept": null}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("Q")]
