"""What `alignsae repack` does; its arguments and its help are in tools/parsers."""

import argparse
import contextlib

import numpy as np
import torch
from tqdm import tqdm

from tools.repacking.labels import Labels
from tools.repacking.samples import ARRAYS, check_suffix, kind_of, read_samples
from tools.repacking.vectors import vectors
from trainer.errors import DataError, UserError
from trainer.stream import Manifest, ShardSpec, ShardWriter
from trainer.stream.manifest import STORED_DTYPES


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
