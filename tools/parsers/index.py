"""Build manifest.json for block shards that were written elsewhere, without copying them.

FOLDER holds uncompressed USTAR tars whose samples are blocks of rows: KEY.acts.npy [n, D] (float16, float32, or
bfloat16 bits as uint16) and, where rows have labels, KEY.concept.npy [n] or [n, M] and KEY.answer.npy [n] (integers,
see docs/data.md). Every byte is read once: checksums, label ranges and the normalisation come out of the same pass.
One-vector samples need `alignsae repack`.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae index`."""
    parser.add_argument("folder", type=Path, help="folder of one split: holds the tars, gets manifest.json")
    parser.add_argument("--model", default="", help="name of the language model, recorded in the manifest")
    parser.add_argument("--hook-point", default="", help="hook point, for example blocks.6.hook_resid_post")
    parser.add_argument(
        "--concepts", type=Path, help="file with one concept name per line, or a JSON list, in label order"
    )
    parser.add_argument("--answers", type=Path, help="file with one answer per line, or a JSON list, in label order")
    for name, suffix in {"acts": "acts.npy", "concept": "concept.npy", "answer": "answer.npy"}.items():
        parser.add_argument(f"--{name}", default=suffix, metavar="SUFFIX", help=f"member suffix (default {suffix})")
    parser.add_argument(
        "--normalisation", metavar="FOLDER", help="take mean and scale from this manifest, as a held-out split should"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing manifest.json")
