"""Turn one-vector WebDataset samples into shards of blocks that are read hundreds of times faster.

webdataset reads the sources. Each sample gives one activation vector, or a matrix of them, in a member of its own:

    .npy .npz .safetensors    floating-point numbers; uint16 is read as the bits of bfloat16

and labels, which may be absent:

    .cls                      an integer
    .txt, other suffixes      text: a name or an integer
    .json                     one field of an object: a name, an integer or null; of concepts a list of them too

    alignsae repack raw/*.tar --out data/mine/layer-06/train --acts npy --concept json:relation --answer cls

Other members are passed over. Pickles (.pth, .pt, .pkl, .pyd) are never read. A held-out split passes --like with the
folder of its train split, so that both share vocabularies and normalisation.
"""

import argparse
from pathlib import Path

from tools.parsers.common import STORED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae repack`."""
    parser.add_argument("sources", nargs="+", metavar="TAR", help="tar files, URLs, or pipe:COMMAND with --allow-pipe")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new split")
    parser.add_argument("--split", default="train", help="name of the split, first part of the shard names")
    parser.add_argument("--acts", default="npy", metavar="SUFFIX", help="member of the activations: npy, acts.npz, ...")
    parser.add_argument("--tensor", help="name of the array where a .npz or .safetensors member holds several")
    for name in ("concept", "answer"):
        parser.add_argument(
            f"--{name}",
            default=f"json:{name}",
            metavar="SUFFIX[:FIELD]",
            help=f"member of the {name} label: cls, txt, or a field of a JSON member (default json:{name})",
        )
    parser.add_argument("--dtype", choices=STORED, help="stored dtype (default: that of the first sample)")
    parser.add_argument("--like", metavar="FOLDER", help="take vocabularies and normalisation from this split")
    parser.add_argument("--model", default="", help="name of the language model, recorded in the manifest")
    parser.add_argument("--hook-point", default="", help="hook point, for example blocks.6.hook_resid_post")
    parser.add_argument("--rows-per-block", type=int, default=4096)
    parser.add_argument("--shard-mb", type=int, default=512, help="shard size in MiB (default 512)")
    parser.add_argument("--allow-pipe", action="store_true", help="permit pipe: sources, which run a program")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished data set in --out")
