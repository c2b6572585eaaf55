"""What `alignsae ontology` does; its arguments and its help are in tools/parsers."""

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from typing import Any

from tools.ontologies.wordnet import Concept, choose_concepts, read_nouns
from trainer.errors import UserError

TEMPLATES = (
    "{A} {word} is a kind of",
    "Q: What kind of thing is {a} {word}?\nA:",
    "I know what {a} {word} is: it is a",
)
HELDOUT, VALIDATION = 5, 10  # every fifth word, every tenth


def rows(concepts: list[Concept], most_words: int, ancestors: bool, seed: int) -> Iterator[dict[str, Any]]:
    """Prompts of all concepts, words in the order of how usual they are."""
    for concept in concepts:
        words = concept.words[:most_words]
        shuffled = random.Random(f"{seed} {concept.name}").sample(words, len(words))
        ends = len(words) // HELDOUT, len(words) // HELDOUT + len(words) // VALIDATION
        splits = dict.fromkeys(shuffled[: ends[0]], "heldout") | dict.fromkeys(shuffled[slice(*ends)], "validation")
        names = {"concepts": [concept.name, *concept.ancestors]} if ancestors else {"concept": concept.name}
        for word in words:
            article = "an" if word[0] in "aeiou" else "a"
            for number, template in enumerate(TEMPLATES):
                yield {
                    "prompt": template.format(A=article.capitalize(), a=article, word=word),
                    **names,
                    "answer": concept.name,
                    "template": number,
                    "subject": word,
                    "split": splits.get(word, "train"),
                }


def run(args: argparse.Namespace) -> int:
    """Read WordNet, choose the concepts and write the folder."""
    if min(args.concepts, args.depth) < 1 or args.words < HELDOUT or args.most_words < args.words:
        raise UserError(f"--concepts and --depth are at least 1, --words at least {HELDOUT} and at most --most-words")
    if args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
        raise UserError(f"{args.out} exists and is not empty: choose another --out or delete it")
    concepts = choose_concepts(read_nouns(args.wordnet), args.concepts, args.words, args.depth)
    written = list(rows(concepts, args.most_words, args.ancestors, args.seed))
    partial = args.out.with_name(f"{args.out.name}.partial")
    described = {c.name: {"words": c.words[: args.most_words], "ancestors": c.ancestors} for c in concepts}
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / "prompts.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in written)
        (partial / "concepts.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        partial.rename(args.out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from error
    words = len({(row["answer"], row["subject"]) for row in written})
    print(f"{args.out}: {len(concepts)} concepts, {words} words, {len(written)} prompts")
    return 0
