"""Train or fine-tune a causal language model on questions and texts.

Every step mixes questions (loss on the answer and the end token only) with texts (loss on all tokens). A model trained
on questions alone memorises them without separating who from what, so give it the biographies too.

  alignsae finetune-lm --data FOLDER_OF_BIOGRAPHIES --out MODEL
  alignsae finetune-lm --from-scratch llama --questions my.jsonl --texts my_texts.jsonl --out MODEL
  alignsae finetune-lm --model FOLDER_OR_ID --questions my.jsonl --out MODEL

From scratch a byte-level BPE tokenizer is trained on the same files. Training happens in OUT.partial, which is renamed
to OUT at the end; started again with the same arguments it goes on from the last checkpoint there. OUT is an ordinary
`save_pretrained` folder plus lm_report.json: answer accuracy (greedy, the whole answer and the end token) per split,
relation and template.
"""

import argparse
from pathlib import Path

from tools.parsers.common import add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--model", help="save_pretrained folder or hub name to fine-tune")
    start.add_argument(
        "--from-scratch",
        metavar="ARCH",
        default="gpt2",
        help="transformers architecture to initialise: gpt2, llama, ...",
    )
    size = parser.add_argument_group("size, from scratch only")
    size.add_argument("--layers", type=int, default=4, help="blocks (default: %(default)s)")
    size.add_argument("--width", type=int, default=128, help="residual width (default: %(default)s)")
    size.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    size.add_argument("--vocabulary", type=int, default=4096, help="tokens of the BPE (default: %(default)s)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, help="output of `alignsae biographies`: its questions and its biographies")
    data.add_argument("--questions", type=Path, help="prompts JSONL: prompt, answer, concept, ...")
    data.add_argument("--texts", type=Path, help="JSONL file or datasets folder of texts to mix in")
    data.add_argument("--field", default="text", help="field of --texts that holds the text (default: %(default)s)")
    data.add_argument(
        "--templates", choices=["all", "train"], default="all", help="questions of which split to train on"
    )
    data.add_argument("--context", type=int, default=256, help="longest sequence in tokens (default: %(default)s)")
    step = parser.add_argument_group("training")
    step.add_argument("--steps", type=int, default=800, help="optimizer steps (default: %(default)s)")
    step.add_argument("--questions-per-step", type=int, default=64, help="default: %(default)s")
    step.add_argument("--texts-per-step", type=int, default=16, help="default: %(default)s")
    step.add_argument("--text-weight", type=float, default=1.0, help="weight of the text loss (default: %(default)s)")
    step.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    step.add_argument(
        "--final-lr", type=float, default=0.1, help="end of the cosine, as a share of --lr (default: %(default)s)"
    )
    step.add_argument("--warmup", type=int, default=60, help="linear warm-up steps (default: %(default)s)")
    step.add_argument("--weight-decay", type=float, default=0.1, help="of matrices, AdamW (default: %(default)s)")
    step.add_argument("--beta2", type=float, default=0.98, help="AdamW (default: %(default)s)")
    step.add_argument("--eps", type=float, default=1e-6, help="AdamW (default: %(default)s)")
    step.add_argument("--clip", type=float, default=1.0, help="global gradient norm (default: %(default)s)")
    step.add_argument("--seed", type=int, default=0, help="initialisation and batch order (default: %(default)s)")
    step.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, fp32 masters")
    add_device(step, "the model")
    step.add_argument("--checkpoint-every", type=int, default=500, help="steps, 0 = never (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
