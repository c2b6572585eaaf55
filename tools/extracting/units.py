"""Units of work as finished shard folders: the rows of a run of documents at several hook points, beside their
statistics."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.extraction import Extractor, Rows
from trainer.stream import ShardSpec, ShardWriter
from trainer.stream.manifest import FILE_NAME
from trainer.stream.normalisation import RunningNormalisation

STATISTICS = "statistics.npz"
EMPTY = "empty"  # file in place of a manifest: none of the unit's tokens is a row


@dataclass
class UnitWriter:
    """Writes units. spec: what a manifest says of a hook point and its width. rows_per_block, shard_bytes: as for
    ShardWriter."""

    extractor: Extractor
    spec: Callable[[str, int], ShardSpec]
    rows_per_block: int
    shard_bytes: int

    def write(self, documents: Sequence[int], folders: dict[str, Path], split: str) -> None:
        """Finish one unit at the hook points of `folders`. split: name of its shards.

        Nothing has a final name in a folder before all of it is there.
        """
        began = time.perf_counter()
        for point, rows in self.extractor.rows(documents, list(folders)).items():
            folder = folders[point]
            if len(rows.acts):
                self._write(self.spec(point, rows.acts.shape[1]), folder, split, rows)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / EMPTY).touch()
        self.extractor.clock.total += time.perf_counter() - began

    def _write(self, spec: ShardSpec, folder: Path, split: str, rows: Rows) -> None:
        """Shards and statistics of a unit at one hook point; nothing is left of a unit that cannot be finished."""
        size, unknown = self.rows_per_block, ([0.0] * spec.width, 1.0)  # the normalisation is that of all units
        statistics = RunningNormalisation(spec.width)
        options = {"rows_per_block": size, "shard_bytes": self.shard_bytes}
        try:
            with ShardWriter(folder, split, spec, **options, normalisation=unknown, overwrite=True) as writer:
                for low in range(0, len(rows.acts), size):
                    part = slice(low, low + size)
                    writer.write(rows.acts[part], rows.concept[part], rows.answer[part], rows.token[part])
                    statistics.add(rows.acts[part].float().numpy())
                statistics.save(folder / STATISTICS)  # before the manifest, which says that the unit is finished
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise UserError(f"{folder}: cannot be written ({error.strerror}); free some space and rerun") from error
            raise


def units_name(made_from: dict[str, Any], batch_size: int) -> str:
    """Name of the folder of unfinished work, which only the same command may go on with: how sequences are batched
    changes the last bits of rows."""
    text = json.dumps([made_from, batch_size], sort_keys=True)
    return f".units-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def is_finished(folder: Path) -> bool:
    """Whether a unit is complete at one hook point."""
    return (folder / FILE_NAME).exists() or (folder / EMPTY).exists()


def joined(units: Sequence[Path]) -> RunningNormalisation:
    """What is known of the rows of finished units together, merged in their order."""
    total, *others = (RunningNormalisation.load(unit / STATISTICS) for unit in units)
    for other in others:
        total.merge(other)
    return total
