"""One data set of parts that were written by several processes: their shards are renamed, their manifests joined."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from trainer.errors import DataError, UserError
from trainer.stream.manifest import FILE_NAME, Manifest, ShardSpec


def join_parts(
    folder: Path,
    split: str,
    spec: ShardSpec,
    parts: Sequence[Path],
    normalisation: tuple[list[float], float],
    median_norm: float | None = None,
) -> Manifest:
    """Make the shards of finished folders those of `folder`, in the order of `parts`, and return its manifest.

    A part keeps its manifest, so that this can be begun again where it was interrupted: shards go first, the manifest
    of `folder` comes last. What `folder` held before is replaced when the first shard of all parts is still in place.
    normalisation: (mean [D], scale); median_norm: of the rows that it was computed from. Raises DataError when a part
    or one of its shards is missing, UserError when the disk refuses.
    """
    manifests = [Manifest.load(part) for part in parts]
    shards = [(part, shard) for part, manifest in zip(parts, manifests, strict=True) for shard in manifest.shards]
    names = [f"{split}-{index:06d}.tar" for index in range(len(shards))]
    try:
        if shards and all((part / shard.name).exists() for part, shard in shards):
            (folder / FILE_NAME).unlink(missing_ok=True)
            for old in folder.glob(f"{split}-*.tar"):
                old.unlink()
        for name, (part, shard) in zip(names, shards, strict=True):
            source, target = part / shard.name, folder / name
            if source.exists():
                source.replace(target)
            elif not target.exists() or target.stat().st_size != shard.bytes:
                raise DataError(f"{source}: is missing; delete {part.parent} and run the command again")
        manifest = Manifest(
            **asdict(spec),
            mean=normalisation[0],
            scale=normalisation[1],
            rows=sum(part.rows for part in manifests),
            shards=tuple(replace(shard, name=name) for name, (_, shard) in zip(names, shards, strict=True)),
            concepts_per_row=max(part.concepts_per_row for part in manifests),
            median_norm=median_norm,
        )
        Manifest.parse(manifest.to_json().encode(), f"{folder}/{FILE_NAME}")
        manifest.save(folder)
    except OSError as error:
        raise UserError(f"{folder}: joining shards failed ({error.strerror}); free some space and rerun") from error
    return manifest
