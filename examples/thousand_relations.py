"""Prompts that ask for a thousand relations: python examples/thousand_relations.py PROMPTS.jsonl

Forty words times twenty-five things make relations that share their words ("first employer", "first teacher", "last
employer"). Eleven templates ask each of them of persons: eight templates and three persons are to train on, one and two
to choose on (validation), two and three held out; a row has template and person of the same split, so neither has been
met before. There are no answers: what is read is which relation is asked, at the last token.
"""

import json
import sys
from pathlib import Path

WHICH = """
    first second last previous next former current favourite oldest youngest best worst only main local foreign secret
    public private early late rival chosen rejected famous forgotten adopted closest distant spiritual legal alleged
    temporary permanent official wealthiest strictest kindest loudest preferred
"""
THING = """
    employer teacher university school neighbour doctor publisher painting novel garden boat horse language dish song
    museum theatre village street hotel lawyer mentor bank newspaper pupil
"""
TEMPLATES = {
    "train": [
        "Q: What is the {relation} of {person}?\nA:",
        "Q: Name the {relation} of {person}.\nA:",
        "Q: Do you know {person}'s {relation}?\nA:",
        "Q: {person} has a {relation}. Which?\nA:",
        "{person} was asked about the {relation}. It is",
        "As everybody knows, {person}'s {relation} is",
        "Of all that {person} has, the {relation} is",
        "Speaking of {person}, I forgot what the {relation} is",
    ],
    "validation": ["Q: Please give {person}'s {relation}.\nA:"],
    "heldout": ["The {relation} of {person} is", "Q: Tell me the {relation} {person} has.\nA:"],
}
PERSONS = {"train": "Maria Torben Aisha", "validation": "Nadia Oskar", "heldout": "Priya Tomas Elena"}


def main(path: Path) -> None:
    """Write a line per relation, template and person of each split."""
    relations = [f"{which} {thing}" for which in WHICH.split() for thing in THING.split()]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for split, templates in TEMPLATES.items():
            for relation in relations:
                for person in PERSONS[split].split():
                    for template in templates:
                        prompt = template.format(relation=relation, person=person)
                        row = {"prompt": prompt, "concept": relation, "subject": person, "split": split}
                        file.write(json.dumps(row) + "\n")
                        written += 1
    print(f"{path}: {len(relations)} relations, {written} prompts")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
