"""Binding, fragmentation and reconstruction of a trained dictionary -> RUN/evaluation.json

  alignsae evaluate --run runs/demo --train data/demo/layer-01/train --heldout data/demo/layer-01/heldout

Definitions are those of docs/design.md ("The numbers") and trainer/analysis/evaluation.py. --unsupervised adds a
dictionary that was trained without the align stage, for the comparison of fragmentation. --text adds rows of ordinary
text, on which concept slots are to be silent. Beside the slots stand a logistic probe and the nearest class mean of the
training rows (trainer/analysis/rivals/), on the same rows; `top1` takes the slot, or concept, of the highest score on a
row, active or not, where `slot_accuracy` counts a row on which no slot is active as wrong. --model adds the loss
recovered, the language model's cross-entropy when the reconstruction replaces the activation: with --prompts on the
held-out answers, at the last prompt token; with --texts on all tokens of text, at all of them (activations of giant
norm, data.max_norm, stay as they are). Notes say which figures stand on few rows, documents, templates or tokens.
"""

import argparse
from pathlib import Path

from tools.parsers.common import add_device, add_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae evaluate`."""
    add_run(parser)
    parser.add_argument("--train", help="shards of the seen templates (default: the shards in RUN/config.yaml)")
    parser.add_argument(
        "--heldout",
        help="shards of the unseen templates (default: data.heldout of the run, else `heldout` beside --train)",
    )
    parser.add_argument(
        "--text",
        help="shards of ordinary text: rows without concepts beside those of each split (default: held-out rows of the "
        "run's sources without concepts)",
    )
    parser.add_argument("--unsupervised", type=Path, help="run folder of a dictionary without the align stage")
    parser.add_argument("--model", help="language model folder, for the loss recovered (with --prompts, --texts)")
    parser.add_argument("--prompts", type=Path, help="prompts JSONL with the answers, for the loss recovered")
    parser.add_argument("--texts", type=Path, help="JSONL file or datasets folder of text, for the loss recovered")
    parser.add_argument("--field", default="text", help="field of --texts that holds the text (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="longest window of a text, tokens (default: 512)")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of --texts at most (default: 20000)")
    add_device(parser, "the language model and the dictionary")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN/evaluation.json)")
