"""Pages about every slot of a dictionary -> RUN/slot-pages/index.html, which a browser opens from the folder or --serve

  alignsae explore --run runs/demo --shards data/demo/layer-01/heldout --model models/demo
  alignsae explore --run runs/demo --serve   # pages that are there

Per slot: the rows that activate it most, with the tokens around them where the shards say which tokens rows are of,
a histogram, how often it is active, and the slots that write nearly the same; with --model the tokens that its decoder
row promotes and suppresses; for concept slots AUROC, false firings and misses on rows whose concepts are known. The
table of all slots can be searched and sorted. One pass over the rows; what is held grows with the slots, not with them.
"""

import argparse
from pathlib import Path

from tools.parsers.common import add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae explore`."""
    parser.add_argument(
        "--run", dest="run_dir", type=Path, required=True, help="folder of a run, a checkpoint, an export or an import"
    )
    parser.add_argument("--shards", help="rows to look at: a shard folder or URL")
    parser.add_argument(
        "--out", type=Path, help="folder to create (default: RUN/slot-pages, which the report links to)"
    )
    parser.add_argument("--model", help="the language model: texts of tokens, and what decoder rows promote")
    parser.add_argument("--prompts", type=Path, help="the JSONL that was extracted, for rows at the end of a prompt")
    parser.add_argument("--rows", type=int, help="look at the first N rows (default: all)")
    parser.add_argument("--contexts", type=int, default=8, help="rows shown of a slot (default: 8)")
    parser.add_argument("--window", type=int, default=8, help="tokens shown on either side (default: 8)")
    parser.add_argument("--serve", action="store_true", help="then serve the folder on this machine until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000, help="of --serve; 0: any that is free (default: 8000)")
    add_device(parser, "dictionary and model")
