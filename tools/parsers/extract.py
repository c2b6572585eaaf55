"""Write activations of a causal language model as tar shards, several hook points in one pass.

  alignsae extract --model M --prompts questions.jsonl --layers 1,2 --out data/demo
  alignsae extract --model M --texts corpus.jsonl --field text --layers 12 --out data/corpus
  accelerate launch --multi_gpu --num_processes 8 -m tools.cli extract --model M --texts corpus --layers 12 --out data/c

Layer L is the residual stream after the block with 0-based index L, `blocks.L.hook_resid_post`; it is written to
OUT/layer-L/{train,validation,heldout}. --hooks names other places: blocks.L.hook_attn_out, blocks.L.hook_mlp_out or
the path of any module; each is written to OUT/NAME.

--prompts reads JSONL rows of three kinds. `prompt` (text) or `messages` (a chat, for the tokenizer's template) give one
row each, the activation at the last token. `text` gives a row per token: with `spans: [{start, end, concept}]` the
tokens that overlap these characters carry the concept, and --outside says what the others are; else all tokens carry
the label of the row. `concept` or `concepts` label a row; without them it is unlabelled, with an empty list it has
explicitly none. `answer` and `split` (train, validation, heldout) may be absent. --texts reads unlabelled text, a row
per token.

Concepts are the names in order of first appearance (or --concepts; rows of other concepts become unlabelled). Rows keep
the order of the input. The other splits carry the normalisation of the training split.

Work is divided into units of --unit-kb of text, which any number of processes deal among themselves: the shards are
the same, byte for byte, on the same kind of device (on CPUs with the same OMP_NUM_THREADS). All processes must see OUT.
Nothing appears under its final name before it is complete; after an interruption the same command goes on with the
units and splits that are not finished. A unit is held in memory at all its hook points: lower --unit-kb where that is
too much.
"""

import argparse
from pathlib import Path

from tools.parsers.common import STORED, add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae extract`."""
    parser.add_argument("--model", required=True, help="save_pretrained folder or hub name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help="JSONL of labelled rows: prompts, chats, texts")
    source.add_argument("--texts", type=Path, help="JSONL file or datasets folder of unlabelled text")
    parser.add_argument("--layers", help="comma-separated block indices, 0-based, or `all`")
    parser.add_argument("--hooks", help="comma-separated hook points, blocks.3.hook_mlp_out or a module's path")
    parser.add_argument("--out", required=True, type=Path, help="folder that receives layer-LL/SPLIT")
    parser.add_argument("--concepts", help="comma-separated concept names in slot order (default: as they appear)")
    parser.add_argument(
        "--outside",
        choices=("none", "unknown"),
        default="none",
        help="tokens outside of all spans are (default: %(default)s)",
    )
    parser.add_argument("--field", default="text", help="field of --texts that holds the text (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=512, help="longest window of a text, tokens (default: %(default)s)"
    )
    parser.add_argument("--skip-first", type=int, default=0, help="drop the first N tokens of each window of a text")
    parser.add_argument("--drop-special", action="store_true", help="drop special tokens of a text")
    parser.add_argument(
        "--heldout", type=int, default=0, metavar="N", help="every N-th row without a split is held out (0 = none)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="sequences per forward pass (default: %(default)s)")
    parser.add_argument("--unit-kb", type=int, default=256, help="KiB of text per unit of work (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the forward pass (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=STORED, default="float16", help="as stored")
    parser.add_argument("--rows-per-block", type=int, default=4096, help="rows per tar sample (default: %(default)s)")
    parser.add_argument("--shard-mb", type=int, default=512, help="most MiB per tar file (default: %(default)s)")
    add_device(parser, "the model")
    parser.add_argument(
        "--device-map", choices=["auto"], help="spread a model that is larger than a device over all of them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace finished splits in OUT")
