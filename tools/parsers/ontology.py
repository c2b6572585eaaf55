"""Labelled prompts from WordNet's nouns: a concept is a synset, and words below it are its examples.

  alignsae ontology --out data/wordnet --concepts 1000 --words 20

OUT receives
  prompts.jsonl   one line per word and template: prompt, concept (or with --ancestors concepts: the word's own concept,
                  then the chosen ones above it), answer (the concept's name), template, subject (the word), split
  concepts.json   per concept its words and the names of its ancestors

Every fifth word of a concept is held out, every tenth is to choose on: with all its templates it is in split `heldout`
or `validation`, and a slot must know the concept by words that it never saw. --wordnet names the folder with data.noun,
index.noun and cntlist.rev (Debian's package wordnet-base, or the dict folder of WordNet 3). The same arguments give the
same bytes.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae ontology`."""
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="default: %(default)s")
    parser.add_argument("--concepts", type=int, default=1000, help="number of concepts (default: %(default)s)")
    parser.add_argument("--words", type=int, default=20, help="fewest words of a concept (default: %(default)s)")
    parser.add_argument("--most-words", type=int, default=40, help="the most usual are kept (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=4, help="fewest steps from the root (default: %(default)s)")
    parser.add_argument("--ancestors", action="store_true", help="label a word with the concepts above its own, too")
    parser.add_argument("--seed", type=int, default=0, help="which words are of which split (default: %(default)s)")
