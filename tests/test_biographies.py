"""The synthetic benchmark: entity lists, questions, biographies, determinism, bad arguments."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.biographies import people
from tools.cli import main
from tools.synthetic.entities import DEFAULT_SIZES, company_cities, names
from tools.synthetic.sentences import QUESTIONS, RELATIONS, SENTENCES
from tools.synthetic.two_hop import ATTRIBUTES, RELATIVES, TWO_HOP_RELATIONS, TWO_HOP_SENTENCES
from trainer.analysis.interventions import swap_pairs
from trainer.errors import UserError
from trainer.language_model import read_prompts

PAPER = {
    "first_names": 411,
    "middle_names": 461,
    "last_names": 1002,
    "universities": 341,
    "majors": 101,
    "companies": 327,
}


def generate(out: Path, *arguments: str) -> Path:
    assert main(["biographies", "--out", str(out), "--persons", "9", "--variants", "2", *arguments]) == 0
    return out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", DEFAULT_SIZES)
def test_lists_are_unique_and_as_long_as_the_papers(kind: str) -> None:
    found = names(kind, DEFAULT_SIZES[kind])
    assert len(set(found)) == len(found) == DEFAULT_SIZES[kind] >= PAPER.get(kind, 1)
    assert names(kind, 7) == found[:7]
    with pytest.raises(UserError, match="can be composed"):
        names(kind, 10_000)


def test_every_company_has_a_city_and_cities_are_shared() -> None:
    cities = names("cities", 250)
    placed = company_cities(names("companies", 327), cities)
    assert set(placed.values()) <= set(cities)
    assert 50 < len(set(placed.values())) < 327


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 24), seed=st.integers(0, 5))
def test_full_names_are_distinct_even_when_every_combination_is_used(count: int, seed: int) -> None:
    sizes = dict(DEFAULT_SIZES, first_names=2, middle_names=3, last_names=4)
    assert len({person["name"] for person in people(count, seed, sizes)}) == count


def test_questions_cover_every_relation_and_template(tmp_path: Path) -> None:
    rows = lines(generate(tmp_path / "b") / "questions.jsonl")
    assert len(rows) == 9 * 6 * 4
    assert list(dict.fromkeys(row["concept"] for row in rows)) == list(RELATIONS)
    for row in rows:
        assert row["prompt"].startswith("Q: ") and row["prompt"].endswith("?\nA:")
        assert row["subject"] in row["prompt"]
        assert row["answer"] == row["answer"].strip() != ""
        assert row["split"] == ("train" if row["template"] < 2 else "heldout")
    assert len({row["prompt"] for row in rows}) == len(rows)
    known = {(row["subject"], row["concept"]): row["answer"] for row in rows}
    assert all(known[row["subject"], row["concept"]] == row["answer"] for row in rows)


def test_the_employer_determines_the_work_city() -> None:
    persons = people(500, 3, dict(DEFAULT_SIZES, companies=20))
    assert len({(p["employer"], p["work_city"]) for p in persons}) == len({p["employer"] for p in persons}) == 20
    assert len({p["birth_city"] for p in persons}) > 100


def test_a_biography_states_every_answer_and_variants_differ(tmp_path: Path) -> None:
    out = generate(tmp_path / "b")
    answers: dict[str, set[str]] = {}
    for row in lines(out / "questions.jsonl"):
        answers.setdefault(row["subject"], set()).add(row["answer"])
    texts = lines(out / "biographies.jsonl")
    assert len(texts) == 18 == len({row["text"] for row in texts})
    for row in texts:
        assert all(answer in row["text"] for answer in answers[row["subject"]])
        assert row["text"].count(row["subject"]) == len(RELATIONS)


def test_same_arguments_same_bytes_other_seed_other_people(tmp_path: Path) -> None:
    first, again = generate(tmp_path / "a"), generate(tmp_path / "b")
    other = generate(tmp_path / "c", "--seed", "1")
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert (first / "questions.jsonl").read_bytes() != (other / "questions.jsonl").read_bytes()


def test_datasets_loads_both_tables(tmp_path: Path) -> None:
    import datasets

    out = generate(tmp_path / "b")
    asked = datasets.load_dataset(str(out), "questions", cache_dir=str(tmp_path / "cache"))["train"]
    told = datasets.load_dataset(str(out), "biographies", cache_dir=str(tmp_path / "cache"))["train"]
    assert set(asked.column_names) == {"prompt", "answer", "concept", "template", "split", "subject"}
    assert (len(asked), len(told)) == (216, 18)
    assert json.loads((out / "meta.json").read_text())["relations"] == list(RELATIONS)


def test_wordings_are_distinct_and_name_the_person() -> None:
    for relation in RELATIONS:
        assert len(set(QUESTIONS[relation])) == 4
        assert all("{name}" in wording for wording in (*QUESTIONS[relation], *SENTENCES[relation]))
    wordings = [wording for relation in RELATIONS for wording in QUESTIONS[relation]]
    assert len(set(wordings)) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--persons", "0"], "--persons 0"),
        (["--variants", "0"], "--variants 0"),
        (["--majors", "9999"], "--majors 9999"),
        (["--persons", "3", "--hops", "2"], "--hops 2 needs at least 4"),
        (["--persons", "3", "--first-names", "1", "--middle-names", "1", "--last-names", "2"], "between 1 and 2"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["biographies", "--out", str(tmp_path / "b"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = generate(tmp_path / "b")
    before = (out / "questions.jsonl").read_bytes()
    assert main(["biographies", "--out", str(out), "--persons", "3"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (out / "questions.jsonl").read_bytes() == before


def test_two_hop_answers_follow_the_relations_that_the_texts_state(tmp_path: Path) -> None:
    out = generate(tmp_path / "b", "--hops", "2")
    texts = [row for row in lines(out / "biographies.jsonl") if row["variant"] == 0]
    stated: dict[tuple[str, str], str] = {}
    for row in texts:
        for relation, sentences in TWO_HOP_SENTENCES.items():
            wordings = (
                re.escape(s.format(name=row["subject"], value="*")).replace(r"\*", "([^.]+)") for s in sentences
            )
            (value,) = (found[1] for w in wordings if (found := re.search(rf"(?:^|\. ){w}", row["text"])))
            stated[row["subject"], relation] = value
    assert len(stated) == 9 * 20 == 9 * len(TWO_HOP_RELATIONS)
    for relation in RELATIVES:  # a cycle: everybody is reached, nobody by themselves
        assert {stated[row["subject"], relation] for row in texts} == {row["subject"] for row in texts}
        assert all(stated[row["subject"], relation] != row["subject"] for row in texts)
    asked = lines(out / "first_hop.jsonl")
    for row in asked:
        name, attribute = row["subject"].split(": ")
        bridge = stated[name, row["concept"]]
        assert row["answer"] == f"{bridge}; {stated[bridge, attribute]}"
        wording = RELATIVES[row["concept"]][row["template"]].format(name=name)
        assert row["prompt"] == f"Q: {ATTRIBUTES[attribute][row['template']].format(name=wording)}\nA:"
    for first, second in zip(asked, lines(out / "second_hop.jsonl"), strict=True):
        assert second["answer"] == stated[second["subject"], second["concept"]]
        assert f"{first['prompt']} {first['answer']}" == f"{second['prompt']} {second['answer']}"
        assert first["split"] == second["split"] == ("train" if first["template"] < 2 else "heldout")


def test_two_hop_questions_bind_ten_relations_at_each_step(tmp_path: Path) -> None:
    out = generate(tmp_path / "b", "--hops", "2")
    first, second, both = (lines(out / f"{name}.jsonl") for name in ("first_hop", "second_hop", "questions"))
    assert list(dict.fromkeys(row["concept"] for row in both)) == list(TWO_HOP_RELATIONS)
    assert {row["concept"] for row in first} == set(RELATIVES)
    assert {row["concept"] for row in second} == set(ATTRIBUTES)
    assert len({row["prompt"] for row in both}) == len(both) == 2 * 9 * 10 * 3 * 4
    assert sorted(map(str, both)) == sorted(map(str, first + second))
    # What a swap asks for instead must be one answer.
    for rows in (first, second):
        assert len({(r["subject"], r["concept"], r["answer"]) for r in rows}) == len(
            {(r["subject"], r["concept"]) for r in rows}
        )
    again = generate(tmp_path / "again", "--hops", "2")
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in out.iterdir())
    assert json.loads((out / "meta.json").read_text())["relations"] == list(TWO_HOP_RELATIONS)


def test_two_hop_swaps_stay_within_a_step_and_ask_for_the_other_chain(tmp_path: Path) -> None:
    out = generate(tmp_path / "b", "--hops", "2")
    chains = {(r["subject"], r["concept"]): r["answer"] for r in lines(out / "questions.jsonl")}
    for table, slots in (("first_hop", range(10)), ("second_hop", range(10, 20))):
        prompts = read_prompts(out / f"{table}.jsonl")
        swaps = swap_pairs(prompts, TWO_HOP_RELATIONS, split="heldout", pairs=200, seed=0)
        assert len(swaps) == 200 and {s.source for s in swaps} == {s.target for s in swaps} == set(slots)
        for swap in swaps:
            assert swap.source_answer == chains[swap.subject, TWO_HOP_RELATIONS[swap.source]]
            assert swap.target_answer == chains[swap.subject, TWO_HOP_RELATIONS[swap.target]]
