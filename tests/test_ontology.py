"""Concepts from WordNet's nouns: which words a concept gets, splits, determinism, bad input."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tools.cli import main
from tools.ontologies.wordnet import Concept
from tools.ontology import rows

# A root above two kinds of animals and a wide synset whose own word is too few; `pluto` is an instance.
TREE = {
    "entity": (None, ["entity"]),
    "animal": ("entity", ["animal", "beast"]),
    "bird": ("animal", ["bird", "hen", "duck", "goose", "swan"]),
    "songbird": ("bird", ["songbird", "finch", "wren", "robin", "lark", "thrush"]),
    "dog": ("animal", ["dog", "hound", "poodle", "collie"]),
    "puppy": ("dog", ["puppy"]),
    "pluto": ("dog", ["pluto"]),
}


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    offsets = {name: 100 + i for i, name in enumerate(TREE)}
    data, index, counts = ["  1 licence\n"], ["  1 licence\n"], []
    for name, (parent, words) in TREE.items():
        listed = " ".join(f"{word} 0" for word in words)
        symbol = "@i" if name == "pluto" else "@"
        pointer = f"001 {symbol} {offsets[parent]:08d} n 0000" if parent else "000"
        data.append(f"{offsets[name]:08d} 03 n {len(words):02x} {listed} {pointer} | a gloss | with a bar  \n")
        for place, word in enumerate(words):
            index.append(f"{word} n 1 1 @ 1 0 {offsets[name]:08d}  \n")
            counts.append(f"{word}%1:03:00:: 1 {10 - place}\n")
    (folder / "data.noun").write_text("".join(data))
    (folder / "index.noun").write_text("".join(index))
    (folder / "cntlist.rev").write_text("".join(counts))
    return folder


def generate(wordnet: Path, out: Path, *arguments: str) -> list[dict]:
    command = ["ontology", "--wordnet", str(wordnet), "--out", str(out), "--words", "5", "--depth", "1"]
    assert main([*command, "--concepts", "3", *arguments]) == 0
    return [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]


def test_a_synset_with_too_few_words_gives_them_to_the_one_above(wordnet: Path, tmp_path: Path) -> None:
    generate(wordnet, tmp_path / "out")
    concepts = json.loads((tmp_path / "out" / "concepts.json").read_text())
    assert {name: set(c["words"]) for name, c in concepts.items()} == {
        "bird": {"bird", "hen", "duck", "goose", "swan"},
        "dog": {"dog", "hound", "poodle", "collie", "puppy"},
        "songbird": {"songbird", "finch", "wren", "robin", "lark", "thrush"},
    }
    assert concepts["songbird"]["ancestors"] == ["bird"]
    assert concepts["songbird"]["words"][:2] == ["songbird", "finch"], "the most usual come first"


def test_held_out_words_are_never_trained_on(wordnet: Path, tmp_path: Path) -> None:
    prompts = generate(wordnet, tmp_path / "out", "--ancestors")
    splits = {split: {r["subject"] for r in prompts if r["split"] == split} for split in ("train", "heldout")}
    assert not splits["train"] & splits["heldout"] and len(splits["heldout"]) == 3
    assert all(r["subject"] in r["prompt"] for r in prompts)
    assert {tuple(r["concepts"]) for r in prompts} == {("bird",), ("dog",), ("songbird", "bird")}
    assert {r["prompt"] for r in prompts if r["subject"] == "hen"} >= {"A hen is a kind of"}
    assert prompts == generate(wordnet, tmp_path / "again", "--ancestors")
    assert prompts != generate(wordnet, tmp_path / "other", "--ancestors", "--seed", "1")


def test_a_tenth_of_twenty_words_is_to_choose_on_and_a_fifth_held_out() -> None:
    concept = Concept("bird", [f"bird{i}" for i in range(20)], [])
    splits = {row["subject"]: row["split"] for row in rows([concept], 20, False, 0)}
    assert Counter(splits.values()) == {"train": 14, "validation": 2, "heldout": 4}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--concepts", "4", "--words", "5", "--depth", "1"], "there are 3 concepts with at least 5 words, not 4"),
        (["--words", "2"], "--words at least 5"),
        (["--wordnet", "nowhere"], "nowhere/data.noun is missing"),
        (["--wordnet", "BROKEN"], "holds no nouns of WordNet 3"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], problem: str, wordnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "data.noun").write_text("what is this\n")
    command = ["ontology", "--wordnet", str(wordnet), "--out", str(tmp_path / "out")]
    assert main([*command, *(a.replace("BROKEN", str(broken)) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
