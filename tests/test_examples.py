"""The scripts of examples/ run, and from nothing to steered text it is no more than eight lines."""

import ast
import json
import os
import runpy
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.language_model import save_model_of
from tests.test_documented_commands import lines
from tests.test_documents import ROOT
from tools import ask
from tools.cli import main
from trainer import load
from trainer.language_model import SPLITS, read_prompts
from trainer.train import main as train

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python examples/NAME ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_steered_text(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("steer.py", tiny_run / "aligned", tiny_run / "lm", "Q bob city", "work", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "Q bob city" in out and "'work': tensor" in out
    text = (EXAMPLES / "steer.py").read_text()
    end = ast.parse(text).body[0].end_lineno
    lines = [line for line in text.splitlines()[end:] if line.strip()]
    assert len(lines) <= 8


def test_read(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("read.py", tiny_run / "aligned", tiny_run / "data" / "train", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "12 rows" in out and "city: active on" in out


def test_spans_by_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["Say “so it is” to PNG 2.0", "call f() or --help in /etc/x", "nothing", "nothing"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run("label_spans.py", tmp_path / "texts.jsonl", tmp_path / "rows.jsonl", monkeypatch=monkeypatch)
    assert "3 texts, 10 spans" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {(row["text"][s["start"] : s["end"]], s["concept"]) for row in rows for s in row["spans"]}
    numbers, words = {("2.0", "version"), ("2.0", "number")}, {("PNG", "acronym"), ("“so it is”", "quotation")}
    code = {("f()", "call"), ("--help", "option"), ("/etc/x", "path")}
    assert found == numbers | words | code | {(text, "code") for text, _ in code}


def test_relations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("relations.py", tmp_path / "prompts.jsonl", monkeypatch=monkeypatch)
    assert "14 relations" in capsys.readouterr().out
    rows = read_prompts(tmp_path / "prompts.jsonl")
    facts = {(row.subject, row.concept): row.answer for row in rows}
    for known in [("Peru", "capital", "Lima"), ("gold", "symbol", "Au"), ("mouse", "plural", "mice")]:
        assert facts[known[:2]] == known[2]
    assert len({row.prompt for row in rows}) == len(rows)
    for split in SPLITS:
        part = [row for row in rows if row.split == split]
        others = [row for row in rows if row.split != split]
        assert {row.concept for row in part} == {row.concept for row in rows}
        assert not {row.subject for row in part} & {row.subject for row in others}
        assert not {(row.concept, row.template) for row in part} & {(row.concept, row.template) for row in others}
    assert len({(row.concept, row.template) for row in rows}) == 14 * 9
    shown = [row.prompt.partition("\n")[0] for row in rows]
    assert len({*shown}) == 15 * 9  # first_letter is asked in two tables
    assert not any(example.endswith(f" {row.answer}.") for example, row in zip(shown, rows, strict=True))


def test_a_thousand_relations_share_neither_template_nor_person_with_a_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("thousand_relations.py", tmp_path / "prompts.jsonl", monkeypatch=monkeypatch)
    assert "1000 relations, 32000 prompts" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    found = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    forms = {
        split: {row["prompt"].replace(row["concept"], "R").replace(row["subject"], "P") for row in part}
        for split, part in found.items()
    }
    persons = {split: {row["subject"] for row in part} for split, part in found.items()}
    for parts, sizes in ((forms, (8, 1, 2)), (persons, (3, 2, 3))):
        assert [len(parts[split]) for split in ("train", "validation", "heldout")] == list(sizes)
        assert len(set.union(*parts.values())) == sum(sizes)
    assert all(len({row["concept"] for row in part}) == 1000 for part in found.values())


def test_a_picture_of_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"binding": {"slot_accuracy": 0.5, "top1": 0.6}, "probe": {"top1": 0.7}}
    swaps = {"alphas": [{"success": 0.2}], "best_success": 0.1, "standard_error": None}
    for layer in ("layer-03", "layer-12"):
        (tmp_path / layer).mkdir()
        (tmp_path / layer / "evaluation.json").write_text(json.dumps({"heldout": figures}))
    for picture, swapped in (("reading.png", 0), ("both.png", 1)):
        if swapped:
            (tmp_path / "layer-12" / "swap.json").write_text(json.dumps({"slots": swaps, "mean_difference": swaps}))
        runs = [tmp_path / layer for layer in ("layer-03", "layer-12")]
        run("horizon.py", tmp_path / picture, *runs, monkeypatch=monkeypatch)
        assert f"2 layers read, {swapped} swapped" in capsys.readouterr().out
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_figures_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for seed, value in enumerate((0.5, 0.7)):
        runs.append(tmp_path / f"run-{seed}")
        runs[-1].mkdir()
        part = {"fvu": value, "l0": 8.0, "slot_accuracy": 1.0, "top1": 1.0, "all": {"efffeat": value}}
        parts = dict.fromkeys(("reconstruction", "binding", "probe", "fragmentation"), part)
        (runs[-1] / "evaluation.json").write_text(json.dumps({"heldout": parts}))
        form = {"success": value, "isolation": None, "joint": 0.25}
        over = {"success": {"difference": value - 0.5, "standard_error": 0.01 + seed / 50}}
        both = {"always": form, "when": form}
        method = {"best_alpha": 1.0 + seed, "forms": both, "slots_over": {"always": over, "when": over}}
        rivals = {"probe": method} | ({"das_1": method} if seed else {})
        swap = {"slots": method, "mean_difference": method, "rivals": rivals}
        (runs[-1] / "swap.json").write_text(json.dumps(swap))
    run("over_seeds.py", *runs, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["2 runs: mean (standard deviation)", "FVU                  0.600 (0.141)"]
    slots = next(line for line in lines if line.startswith("slots "))
    assert slots.split() == ["slots", "always", "1,2", "0.600", "(0.141)", "-", "0.250", "(0.000)"]
    probe = next(line for line in lines if line.startswith("probe") and " always " in line)
    assert probe.endswith("0.100 (0.141), 0.020") and not any(line.startswith("das_1") for line in lines)


RECORD = '#!/bin/sh\nfor word in "${0##*/}" "$@"; do echo "$word"; done >> RECORD\necho >> RECORD\n'
TEXTS = ["The quick brown fox jumps over the lazy dog, and the capital of Peru is Lima."] * 40
SHORT = {
    "train": ["stages.0.steps=2", "stages.1.steps=2", "dictionary.free_slots=64", "tracking.uri=off"],
    "swap": ["--pairs", "8", "--alphas", "1", "--learn-steps", "1"],
}


def told(known: Path, model: Any, tokenizer: Any, prompts: list[str], *rest: Any) -> list[str]:
    """Answers of a model that knows every third fact of the prompts `known`."""
    facts = {row.prompt: row.answer for row in read_prompts(known)}
    return [facts[prompt] if len(prompt) % 3 == 0 else "" for prompt in prompts]


@pytest.mark.slow
def test_readme_goes_from_prompts_to_swaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of its section on a user's own model and concepts; the layers are those that a tiny model has."""
    section = (ROOT / "README.md").read_text().partition("## Your own model and concepts\n")[2].partition("\n## ")[0]
    here = {"MODEL": "lm", "12,20": "0,1", "layer-20": "layer-01", "configs/": f"{ROOT}/configs/"}
    for word, ours in here.items():
        section = section.replace(word, ours)
    commands = [shlex.split(line) for line in lines(section) if line.startswith(("python ", "alignsae "))]
    names = "examples/relations.py ask extract train evaluate swap steer explore report export"
    assert [words[1] for words in commands] == names.split()
    monkeypatch.chdir(tmp_path)
    save_model_of(TEXTS, Path("lm"), context=256)
    monkeypatch.setattr(ask, "generate_answers", partial(told, Path("prompts.jsonl")))
    for program, name, *arguments in commands:
        arguments += SHORT.get(name, [])
        if program == "python":
            run(Path(name).name, *arguments, monkeypatch=monkeypatch)
        else:  # the launcher of `alignsae train` has tests of its own
            assert (train(arguments) if name == "train" else main([name, *arguments])) == 0, capsys.readouterr().err
    result, swap = (json.loads(Path(f"runs/mine/{name}.json").read_text()) for name in ("evaluation", "swap"))
    assert {"train", "heldout"} <= {*result} and swap["validation"]["on"] == "validation prompts"
    assert "before:" in capsys.readouterr().out
    assert Path("runs/mine/slot-pages/index.html").is_file() and Path("runs/mine/report.html").is_file()
    assert len(load("exported/mine").concepts) == 14 and len(load("exported/mine").gains) > 0


@pytest.mark.slow
def test_relations_from_facts_to_swaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of relations.sh on a tiny model that is taken to know every third fact."""
    monkeypatch.chdir(tmp_path)
    for name in ("alignsae", "python"):
        (tmp_path / name).write_text(RECORD)
        (tmp_path / name).chmod(0o755)
    save_model_of(TEXTS, Path("lm"), context=256)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    script = ["bash", str(EXAMPLES / "relations.sh"), "lm", "texts.jsonl", "0,1"]
    subprocess.run(script, check=True, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    commands = [block.splitlines() for block in Path("RECORD").read_text().strip().split("\n\n")]
    monkeypatch.setattr(ask, "generate_answers", partial(told, Path("data/facts/prompts.jsonl")))
    for program, name, *arguments in commands:
        more = SHORT.get(name, [])
        if program == "python":
            run(Path(name).name, *arguments, monkeypatch=monkeypatch)
        else:  # the launcher of `alignsae train` has tests of its own
            ended = train([*arguments[2:], *more]) if name == "train" else main([name, *arguments, *more])
            assert ended == 0, capsys.readouterr().err
    for layer in ("layer-00", "layer-01"):
        folder = Path("runs") / f"relations-{layer}"
        validation, heldout, swap = (
            json.loads((folder / name).read_text()) for name in ("validation.json", "evaluation.json", "swap.json")
        )
        assert validation["heldout"]["labels"] != heldout["heldout"]["labels"]
        assert swap["validation"]["on"] == "validation prompts" and swap["split"] == "heldout"
    assert "2 layers read, 2 swapped" in capsys.readouterr().out
    assert Path("horizon.png").read_bytes().startswith(b"\x89PNG")


def test_every_example_is_run() -> None:
    tests = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tests for path in EXAMPLES.iterdir() if path.is_file())
