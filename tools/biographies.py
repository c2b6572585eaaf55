"""Generate the synthetic biography benchmark of arXiv 2512.02004 with invented entities.

Every person has a birth date, a birth city, a university, a major and an employer; the employer's city is the work
city. OUT receives
  questions.jsonl    one line per person, relation and question template: prompt, answer, concept (relation), template
                     (0..3), split (train | heldout, by template), subject
  biographies.jsonl  one line per person and variant: text, subject, variant
  meta.json          seed, sizes, relations in slot order, templates
  README.md          dataset card, so that `datasets.load_dataset(OUT, "questions")` works

A prompt is `Q: {question}\\nA:` without a trailing space; an answer is stored without a leading space and is tokenised
as one space followed by the answer. The same arguments give the same bytes.
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.synthetic.entities import DEFAULT_SIZES, company_cities, names
from tools.synthetic.sentences import QUESTIONS, RELATIONS, SENTENCES, TRAIN_TEMPLATES
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
- config_name: questions
  data_files: questions.jsonl
- config_name: biographies
  data_files: biographies.jsonl
---
# Synthetic biographies

{persons} invented persons, {variants} biography texts each, {relations} relations, four question templates per relation
(templates 0 and 1 in split `train`, 2 and 3 in split `heldout`). Seed {seed}. Written by `alignsae biographies`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    parser.add_argument("--persons", type=int, default=1000, help="number of persons (default: %(default)s)")
    parser.add_argument("--variants", type=int, default=5, help="biography texts per person (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of names, attributes and texts (default: %(default)s)"
    )
    for kind, size in DEFAULT_SIZES.items():
        parser.add_argument(
            f"--{kind.replace('_', '-')}", type=int, default=size, help="length of that list (default: %(default)s)"
        )


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
                "prompt": f"Q: {question.format(name=person['name'])}\nA:",
                "answer": person[relation],
                "concept": relation,
                "template": template,
                "split": "train" if template in TRAIN_TEMPLATES else "heldout",
                "subject": person["name"],
            }


def biography(person: dict[str, str], rng: random.Random) -> str:
    """One text that states every relation once, in random order and wording."""
    order = rng.sample(RELATIONS, len(RELATIONS))
    return " ".join(rng.choice(SENTENCES[r]).format(name=person["name"], value=person[r]) for r in order)


def run(args: argparse.Namespace) -> int:
    if args.variants < 1:
        raise UserError(f"--variants {args.variants}: at least 1 biography per person is needed")
    if args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
        raise UserError(f"{args.out} exists and is not empty: choose another --out or delete it")
    sizes = {kind: getattr(args, kind) for kind in DEFAULT_SIZES}
    persons = people(args.persons, args.seed, sizes)
    partial = args.out.with_name(f"{args.out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (
            (partial / "questions.jsonl").open("w", encoding="utf-8") as asked,
            (partial / "biographies.jsonl").open("w", encoding="utf-8") as told,
        ):
            for index, person in enumerate(tqdm(persons, desc="persons", unit="person")):
                asked.writelines(json.dumps(row) + "\n" for row in questions(person))
                for variant in range(args.variants):
                    text = biography(person, random.Random(f"{args.seed} {index} {variant}"))
                    row = {"text": text, "subject": person["name"], "variant": variant}
                    told.write(json.dumps(row) + "\n")
        meta = {
            "seed": args.seed,
            "persons": args.persons,
            "variants": args.variants,
            "sizes": sizes,
            "relations": list(RELATIONS),
            "templates": {relation: list(QUESTIONS[relation]) for relation in RELATIONS},
            "train_templates": list(TRAIN_TEMPLATES),
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        card = CARD.format(persons=args.persons, variants=args.variants, relations=len(RELATIONS), seed=args.seed)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(args.out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from error
    print(f"{args.out}: {args.persons} persons, {args.persons * len(RELATIONS) * 4} questions")
    return 0
