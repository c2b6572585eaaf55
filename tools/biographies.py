"""What `alignsae biographies` does; its arguments and its help are in tools/parsers."""

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from tools.synthetic.entities import DEFAULT_SIZES, company_cities, names
from tools.synthetic.sentences import QUESTIONS, RELATIONS, SENTENCES, TRAIN_TEMPLATES, as_prompt, split_of
from tools.synthetic.two_hop import ATTRIBUTES, RELATIVES, TWO_HOP_RELATIONS, TWO_HOP_SENTENCES, steps, with_relatives
from trainer.errors import UserError

MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
YEARS = range(1940, 2005)
CARD = """---
configs:
{configs}
---
# Synthetic biographies

{persons} invented persons, {variants} biography texts each, {relations} relations, four question templates per {what}
(templates 0 and 1 in split `train`, 2 and 3 in split `heldout`). Seed {seed}. Written by `alignsae biographies`.
"""


def people(count: int, seed: int, sizes: dict[str, int]) -> list[dict[str, str]]:
    """`count` persons with distinct full names: a dict with "name" and one answer per relation."""
    lists = {kind: names(kind, size) for kind, size in sizes.items()}
    possible = sizes["first_names"] * sizes["middle_names"] * sizes["last_names"]
    if not 1 <= count <= possible:
        raise UserError(f"--persons {count}: the name lists give between 1 and {possible} distinct persons")
    city_of = company_cities(lists["companies"], lists["cities"])
    rng = random.Random(seed)
    firsts, middles, lasts = lists["first_names"], lists["middle_names"], lists["last_names"]
    persons = []
    # Sampling without replacement from the product keeps full names distinct at any density.
    for index in rng.sample(range(possible), count):
        index, first = divmod(index, len(firsts))
        last, middle = divmod(index, len(middles))
        employer = rng.choice(lists["companies"])
        persons.append(
            {
                "name": f"{firsts[first]} {middles[middle]} {lasts[last]}",
                "birth_date": f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.choice(YEARS)}",
                "birth_city": rng.choice(lists["cities"]),
                "university": rng.choice(lists["universities"]),
                "major": rng.choice(lists["majors"]),
                "employer": employer,
                "work_city": city_of[employer],
            }
        )
    return persons


def questions(person: dict[str, str]) -> Iterator[dict[str, Any]]:
    """All questions about one person, in relation and template order."""
    for relation in RELATIONS:
        for template, question in enumerate(QUESTIONS[relation]):
            yield {
                "prompt": as_prompt(question.format(name=person["name"])),
                "answer": person[relation],
                "concept": relation,
                "template": template,
                "split": split_of(template),
                "subject": person["name"],
            }


def biography(person: dict[str, str], sentences: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """One text that states every relation once, in random order and wording."""
    order = rng.sample([*sentences], len(sentences))
    return " ".join(rng.choice(sentences[r]).format(name=person["name"], value=person[r]) for r in order)


def asked(persons: Sequence[dict[str, str]], hops: int) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """For each person the rows of every file of prompts, by its name."""
    by_name = {person["name"]: person for person in persons}
    for index, person in enumerate(persons):
        if hops == 1:
            yield {"questions": [*questions(person)]}
        else:
            first, second = steps(index, by_name, person["name"])
            yield {"questions": first + second, "first_hop": first, "second_hop": second}


def run(args: argparse.Namespace) -> int:
    if args.variants < 1:
        raise UserError(f"--variants {args.variants}: at least 1 biography per person is needed")
    if args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
        raise UserError(f"{args.out} exists and is not empty: choose another --out or delete it")
    sizes = {kind: getattr(args, kind) for kind in DEFAULT_SIZES}
    persons = people(args.persons, args.seed, sizes)
    relations, sentences = RELATIONS, SENTENCES
    templates: dict[str, tuple[str, ...]] = dict(QUESTIONS)
    tables = ["questions"]
    if args.hops == 2:
        persons = with_relatives(persons, args.seed)
        relations, sentences, templates = TWO_HOP_RELATIONS, TWO_HOP_SENTENCES, {**RELATIVES, **ATTRIBUTES}
        tables += ["first_hop", "second_hop"]
    rows = dict.fromkeys(tables, 0)
    partial = args.out.with_name(f"{args.out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = {
                table: stack.enter_context((partial / f"{table}.jsonl").open("w", encoding="utf-8"))
                for table in (*tables, "biographies")
            }
            both = zip(persons, asked(persons, args.hops), strict=True)
            for index, (person, found) in enumerate(tqdm(both, desc="persons", total=len(persons), unit="person")):
                for table, prompts in found.items():
                    files[table].writelines(json.dumps(row) + "\n" for row in prompts)
                    rows[table] += len(prompts)
                for variant in range(args.variants):
                    text = biography(person, sentences, random.Random(f"{args.seed} {index} {variant}"))
                    row = {"text": text, "subject": person["name"], "variant": variant}
                    files["biographies"].write(json.dumps(row) + "\n")
        meta = {
            "seed": args.seed,
            "persons": args.persons,
            "variants": args.variants,
            "sizes": sizes,
            "relations": list(relations),
            "templates": {relation: list(templates[relation]) for relation in relations},
            "train_templates": list(TRAIN_TEMPLATES),
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        card = CARD.format(
            configs="\n".join(f"- config_name: {t}\n  data_files: {t}.jsonl" for t in files),
            persons=args.persons,
            variants=args.variants,
            relations=len(relations),
            what="relation" if args.hops == 1 else "pair of relations",
            seed=args.seed,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(args.out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from error
    print(f"{args.out}: {args.persons} persons, {rows['questions']} questions")
    return 0
