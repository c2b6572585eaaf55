"""What `alignsae index` does; its arguments and its help are in tools/parsers."""

import argparse
from pathlib import Path

from tqdm import tqdm

from trainer.errors import DataError, UserError
from trainer.stream import Manifest
from trainer.stream.blocks import nonfinite_rows, open_block
from trainer.stream.manifest import FILE_NAME, Shard
from trainer.stream.names import read_names
from trainer.stream.normalisation import RunningNormalisation
from trainer.stream.scan import SUFFIXES, form_of, scan_shard
from trainer.stream.shards import from_stored

_ANY_LABEL = 1 << 31  # bound while the vocabulary is still unknown


def run(args: argparse.Namespace) -> None:
    """Scan the folder and write its manifest last."""
    folder: Path = args.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / FILE_NAME).exists() and not args.overwrite:
        raise UserError(f"{folder} already has a {FILE_NAME}; pass --overwrite to replace it")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: holds no .tar files")
    concepts, answers = (read_names(path) if path else None for path in (args.concepts, args.answers))
    given = Manifest.load(args.normalisation) if args.normalisation else None
    suffixes = {name: getattr(args, name) for name in SUFFIXES}
    bounds = [len(names) if names is not None else _ANY_LABEL for names in (concepts, answers)]
    shards: list[Shard] = []
    running: RunningNormalisation | None = None
    dtype, labels, per_row = "", [-1, -1], 1
    with tqdm(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True, desc="index") as bar:
        for path in paths:
            shard, data = scan_shard(path, suffixes, bar.update)
            shards.append(shard)
            for block in shard.blocks:
                place = f"{path}: block {block.key} at byte {block.offset}"
                extent = data[block.offset : block.offset + block.bytes]
                try:
                    if running is None:
                        width, dtype = form_of(extent, block)
                        running = RunningNormalisation(width)
                    rows = open_block(extent, block, running.width, dtype, *bounds)
                except DataError as error:
                    raise DataError(f"{place}: {error}") from None
                bad = nonfinite_rows(rows.acts, dtype)
                if bad is not None:
                    raise DataError(f"{place}: row {bad[0]} holds NaN or infinity; extract it again")
                running.add(from_stored(rows.acts.copy(), dtype).float().numpy())
                per_row = max(per_row, rows.concept.shape[1])
                labels = [max(a, int(b.max())) for a, b in zip(labels, (rows.concept, rows.answer), strict=True)]
    if running is None:
        raise DataError(f"{folder}: the shards hold no rows")
    mean, scale = (given.mean, given.scale) if given else running.result(str(folder))
    if len(mean) != running.width:
        raise UserError(f"{args.normalisation}: width {len(mean)} differs from {running.width} of {folder}")
    manifest = Manifest(
        width=running.width,
        dtype=dtype,
        model=args.model,
        hook_point=args.hook_point,
        mean=mean,
        scale=scale,
        concepts=concepts if concepts is not None else [f"concept-{i}" for i in range(labels[0] + 1)],
        answers=answers if answers is not None else [f"answer-{i}" for i in range(labels[1] + 1)],
        rows=running.rows,
        shards=tuple(shards),
        concepts_per_row=per_row,
        median_norm=None if given else running.median_norm,
    )
    # What is written must be readable: the same checks as for any manifest.
    Manifest.parse(manifest.to_json().encode(), f"{folder}/{FILE_NAME}")
    manifest.save(folder)
    print(
        f"{folder}: {manifest.rows} rows of {manifest.width} x {dtype} in {len(manifest.blocks)} blocks, "
        f"{len(shards)} shards, digest {manifest.digest[:16]}"
    )
