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
import contextlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tools.repacking.labels import Labels
from tools.repacking.samples import ARRAYS, check_suffix, kind_of, read_samples
from tools.repacking.vectors import vectors
from trainer.errors import DataError, UserError
from trainer.stream import Manifest, ShardSpec, ShardWriter
from trainer.stream.manifest import STORED_DTYPES


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
    parser.add_argument("--dtype", choices=list(STORED_DTYPES), help="stored dtype (default: that of the first sample)")
    parser.add_argument("--like", metavar="FOLDER", help="take vocabularies and normalisation from this split")
    parser.add_argument("--model", default="", help="name of the language model, recorded in the manifest")
    parser.add_argument("--hook-point", default="", help="hook point, for example blocks.6.hook_resid_post")
    parser.add_argument("--rows-per-block", type=int, default=4096)
    parser.add_argument("--shard-mb", type=int, default=512, help="shard size in MiB (default 512)")
    parser.add_argument("--allow-pipe", action="store_true", help="permit pipe: sources, which run a program")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished data set in --out")


def run(args: argparse.Namespace) -> None:
    """Read the sources one after the other and write blocks."""
    check_suffix("--acts", args.acts)
    if kind_of(args.acts) not in ARRAYS:
        raise UserError(f"--acts {args.acts}: only members {', '.join(ARRAYS)} hold activations")
    like = Manifest.load(args.like) if args.like else None
    concepts = Labels("concept", args.concept, like.concepts if like else None)
    answers = Labels("answer", args.answer, like.answers if like else None)
    writer: ShardWriter | None = None
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(unit="row", unit_scale=True, desc="repack"))
        suffixes = {args.acts, concepts.suffix, answers.suffix}
        for sample in (s for source in args.sources for s in read_samples(source, suffixes, args.allow_pipe)):
            where = sample["__url__"]
            acts = vectors(sample.get(args.acts.lower()), args.acts, args.tensor, where)
            if writer is None:
                writer = stack.enter_context(
                    ShardWriter(
                        args.out,
                        args.split,
                        ShardSpec(
                            width=acts.shape[1],
                            dtype=args.dtype or _stored_dtype(acts),
                            concepts=concepts.names,
                            answers=answers.names,
                            model=args.model or (like.model if like else ""),
                            hook_point=args.hook_point or (like.hook_point if like else ""),
                        ),
                        rows_per_block=args.rows_per_block,
                        shard_bytes=args.shard_mb << 20,
                        normalisation=(like.mean, like.scale) if like else None,
                        overwrite=args.overwrite,
                    )
                )
            if acts.shape[1] != writer.spec.width:
                raise DataError(f"{where}: vector of width {acts.shape[1]}, the first sample has {writer.spec.width}")
            listed = np.tile(concepts.indices(sample.get(concepts.suffix), where), (len(acts), 1))
            writer.write(acts, listed, np.full(len(acts), answers.index(sample.get(answers.suffix), where)))
            bar.update(len(acts))
        if writer is None:
            raise UserError("the sources hold no samples")
        manifest = writer.close()
    print(f"{args.out}: {manifest.rows} rows of {manifest.width} x {manifest.dtype}, digest {manifest.digest[:16]}")


def _stored_dtype(acts: torch.Tensor) -> str:
    name = str(acts.dtype).removeprefix("torch.")
    return name if name in STORED_DTYPES else "float32"
