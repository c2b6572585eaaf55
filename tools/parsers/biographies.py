"""Generate the synthetic biography benchmark of arXiv 2512.02004 with invented entities.

Every person has a birth date, a birth city, a university, a major and an employer; the employer's city is the work
city. OUT receives
  questions.jsonl    one line per person, relation and question template: prompt, answer, concept (relation), template
                     (0..3), split (train | heldout, by template), subject
  biographies.jsonl  one line per person and variant: text, subject, variant
  meta.json          seed, sizes, relations in slot order, templates
  README.md          dataset card, so that `datasets.load_dataset(OUT, "questions")` works

--hops 2 asks "What is the employer of the mentor of NAME?". There are ten relations to other persons and ten
attributes, the six among them, all stated in the biographies; each person's ten relations are asked with three of the
attributes. The answer comes in steps, `BRIDGE; ANSWER`, and each step has rows of its own:
  first_hop.jsonl    the prompt up to `A:`, concept the first relation, answer `BRIDGE; ANSWER`
  second_hop.jsonl   the prompt that goes on with ` BRIDGE;`, concept the attribute, answer `ANSWER`, subject the bridge
  questions.jsonl    both

A prompt is `Q: {question}\\nA:` without a trailing space; an answer is stored without a leading space and is tokenised
as one space followed by the answer. The same arguments give the same bytes.
"""

import argparse
from pathlib import Path

from tools.synthetic.entities import DEFAULT_SIZES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    parser.add_argument("--hops", type=int, choices=(1, 2), default=1, help="relations per question (default: 1)")
    parser.add_argument("--persons", type=int, default=1000, help="number of persons (default: %(default)s)")
    parser.add_argument("--variants", type=int, default=5, help="biography texts per person (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of names, attributes and texts (default: %(default)s)"
    )
    for kind, size in DEFAULT_SIZES.items():
        parser.add_argument(
            f"--{kind.replace('_', '-')}", type=int, default=size, help="length of that list (default: %(default)s)"
        )
