"""Ask a language model, as it is, what its prompts ask, and keep what it knows.

  alignsae ask --model M --prompts questions.jsonl --out known.jsonl

Prints the share of prompts that it answers, per concept and template, by three rules (exact, prefix, first token), and
suggests one for `alignsae swap --match`. --out receives the lines of the prompts that are answered by --match, as they
were. A swap can only be judged on answers that the model has. Prompts without an answer are passed over.
"""

import argparse
from pathlib import Path

from tools.parsers.common import MATCH, add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae ask`."""
    parser.add_argument("--model", required=True, help="save_pretrained folder or hub name")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSONL with prompt or messages, answer, concept, template"
    )
    parser.add_argument("--out", type=Path, help="where the lines of the answered prompts go")
    parser.add_argument("--match", choices=MATCH, help="rule of --out (default: the one that is suggested)")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts per forward pass (default: 64)")
    add_device(parser, "the model")
