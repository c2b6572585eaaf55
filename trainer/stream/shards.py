"""Writing shards: rows become blocks, blocks become webdataset samples in USTAR tars, the manifest comes last."""

import io
import math
import os
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from trainer.errors import UserError
from trainer.labels import MOST_PER_ROW, BadLabel, canonical, narrowed, widened
from trainer.stream import npy
from trainer.stream.manifest import FILE_NAME, MAX_PAYLOAD, Block, Manifest, Shard, ShardSpec
from trainer.stream.normalisation import MAX_NORM, RunningNormalisation
from trainer.stream.sink import Sink

TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


def to_stored(acts: torch.Tensor | np.ndarray, dtype: str) -> np.ndarray:
    """Activations as the array that a shard stores: float16, float32, or bfloat16 bits as uint16."""
    tensor = torch.as_tensor(acts).detach().to("cpu").to(TORCH_DTYPES[dtype]).contiguous()
    return tensor.view(torch.uint16).numpy() if dtype == "bfloat16" else tensor.numpy()


def from_stored(stored: np.ndarray, dtype: str) -> torch.Tensor:
    """Inverse of `to_stored`, sharing memory."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def row_norms(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Norms [n] fp32 of stored activations [n, D], a few rows at a time."""
    parts = (from_stored(stored[low : low + 1024].copy(), dtype) for low in range(0, len(stored), 1024))
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts]).numpy()


class ShardWriter:
    """Writes one split into `folder`: SPLIT-000000.tar, SPLIT-000001.tar, ... and manifest.json.

    Use as a context manager. Everything is written under temporary names and renamed at the end, the manifest last:
    after an exception (a full disk included) nothing is left under a final name. The names in `spec` are read again at
    the end, so a caller that discovers names on the way may append to the lists that it passed.

    folder: the folder of this split, e.g. data/demo/layer-06/train. spec: what the manifest says beside what is
    computed. normalisation: (mean [D], scale) of another split, for a held-out split; computed from the rows when None,
    without those whose norm is above max_norm times the median norm (0: from all).
    Raises UserError for impossible settings, labels out of range, NaN or infinite rows, a finished folder.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        spec: ShardSpec,
        *,
        rows_per_block: int = 4096,
        shard_bytes: int = 512 << 20,
        normalisation: tuple[list[float], float] | None = None,
        max_norm: float = MAX_NORM,
        overwrite: bool = False,
    ):
        self.folder = Path(folder)
        try:
            spec.check()
        except ValueError as error:
            raise UserError(f"{self.folder}: {error}") from None
        if rows_per_block < 1 or shard_bytes < 1:
            raise UserError(f"rows_per_block={rows_per_block} and shard_bytes={shard_bytes} must be positive")
        if rows_per_block > (most := MAX_PAYLOAD // (2 * spec.row_bytes)):
            raise UserError(
                f"rows_per_block={rows_per_block} of {spec.row_bytes} bytes do not fit a tar member; use at most {most}"
            )
        if not split.replace("-", "").replace("_", "").isalnum() or not split.isascii():
            raise UserError(f"split {split!r} must be of letters, digits, - and _")
        if (self.folder / FILE_NAME).exists() and not overwrite:
            raise UserError(
                f"{self.folder} already holds a finished data set; choose another folder or pass --overwrite"
            )
        self.split, self.spec = split, spec
        self.rows_per_block, self.shard_bytes = rows_per_block, shard_bytes
        self.given, self.normalisation = normalisation, RunningNormalisation(spec.width, max_norm)
        self.manifest: Manifest | None = None  # set by a successful close
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._pending_rows = 0
        self._rows = 0
        self._per_row = 1  # the most concepts that a row lists
        self._origin = 0  # columns of `token`
        self._shards: list[Shard] = []
        self._blocks: list[Block] = []
        self._file: BinaryIO | None = None
        self._finished = self._aborted = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f".{split}-*.tar.tmp"):  # by a writer that was killed
                left.unlink()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be created ({error.strerror}); choose another folder") from None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.abort()
        else:
            self.close()

    def write(self, acts: torch.Tensor | np.ndarray, concept, answer, token: np.ndarray | None = None) -> None:
        """Append rows. acts [n, D] float; concept [n] or [n, M] integers, see trainer.labels; answer [n] integers, -1
        for none.

        token: integers [n, 3], where the rows come from (token id, document, position); all rows have it or none.
        """
        self._check_alive()
        width, dtype = self.spec.width, self.spec.dtype
        stored = to_stored(acts, dtype)
        concepts, answers = (np.asarray(torch.as_tensor(v).cpu(), dtype=np.int64) for v in (concept, answer))
        n, wide = len(stored), concepts.shape[1] if concepts.ndim == 2 else 1
        shaped = stored.shape == (n, width) and concepts.shape in ((n,), (n, wide)) and answers.shape == (n,)
        if not shaped or not 1 <= wide <= MOST_PER_ROW:
            raise UserError(
                f"rows must be acts [n, {width}], concept [n] or [n, 1 to {MOST_PER_ROW}] and answer [n]; "
                f"got {[tuple(stored.shape), concepts.shape, answers.shape]}"
            )
        finite = torch.isfinite(from_stored(stored, dtype)).all(dim=1)
        if not finite.all():
            bad = int((~finite).nonzero()[0, 0])
            hint = "; float16 ends at 65504, try bfloat16 or float32" if dtype == "float16" else ""
            raise UserError(f"row {self._rows + bad} of {self.folder} is NaN or infinite as {dtype}{hint}")
        try:
            labels = canonical(concepts, len(self.spec.concepts))
        except BadLabel as error:
            raise UserError(f"row {self._rows + error.row} of {self.folder}: {error}") from None
        outside = (answers < -1) | (answers >= len(self.spec.answers))
        if outside.any():
            bad = int(outside.argmax())
            raise UserError(
                f"row {self._rows + bad} of {self.folder}: answer {answers[bad]} is outside "
                f"-1..{len(self.spec.answers) - 1}"
            )
        origin = np.zeros((n, 0), np.int32) if token is None else np.asarray(token, dtype=np.int32)
        if origin.shape not in ((n, 0), (n, 3)) or (self._rows and origin.shape[1] != self._origin):
            raise UserError(f"token of {self.folder} is {origin.shape}: give [n, 3] with all rows, or with none")
        self._origin = origin.shape[1]
        self._rows += len(stored)
        self._per_row = max(self._per_row, narrowed(labels).shape[1])
        self._pending.append((stored.copy(), labels, answers.astype(np.int32), origin))
        self._pending_rows += len(stored)
        if self._pending_rows >= self.rows_per_block:
            self._flush(final=False)

    def close(self) -> Manifest:
        """Write what is left, give everything its final name, and return the manifest."""
        if self._finished:
            assert self.manifest is not None
            return self.manifest
        self._check_alive()
        try:
            self._flush(final=True)
            self._end_shard()
            if not self._rows:
                raise UserError(f"{self.folder}: no rows were written")
            mean, scale = self.given or self.normalisation.result(str(self.folder))
            if len(mean) != self.spec.width or not all(map(math.isfinite, (*mean, scale))) or not scale > 0:
                raise UserError(f"normalisation needs {self.spec.width} finite means and a positive scale")
            manifest = Manifest(
                **asdict(self.spec),
                mean=[float(value) for value in mean],
                scale=float(scale),
                rows=self._rows,
                concepts_per_row=self._per_row,
                median_norm=None if self.given else self.normalisation.median_norm,
                shards=tuple(self._shards),
            )
            # What is written must be readable; names that were appended meanwhile are checked here.
            Manifest.parse(manifest.to_json().encode(), f"{self.folder}/{FILE_NAME}")
            self._publish(manifest)
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise self._disk_error(error) from error
            raise
        self.manifest, self._finished = manifest, True
        return manifest

    def abort(self) -> None:
        """Remove every temporary file; the folder holds nothing new under a final name."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self._finished:
            self._aborted = True
            for index in range(len(self._shards) + 1):
                self._temporary(index).unlink(missing_ok=True)

    def _check_alive(self) -> None:
        if self._aborted:
            raise UserError(f"{self.folder}: writing was given up after an error, nothing was kept; start again")

    def _name(self, index: int) -> str:
        return f"{self.split}-{index:06d}.tar"

    def _temporary(self, index: int) -> Path:
        return self.folder / f".{self._name(index)}.tmp"

    def _disk_error(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: writing shards failed ({error.strerror}); nothing was kept, free space and rerun"
        )

    def _flush(self, final: bool) -> None:
        """Cut the pending rows into blocks; the rest stays pending unless this is the end."""
        if not self._pending:
            return
        pending = [
            (acts, widened(narrowed(c), self._per_row), answer, token) for acts, c, answer, token in self._pending
        ]
        acts, concept, answer, token = (np.concatenate(parts) for parts in zip(*pending, strict=True))
        cut = len(acts) if final else len(acts) - len(acts) % self.rows_per_block
        try:
            for low in range(0, cut, self.rows_per_block):
                high = min(low + self.rows_per_block, cut)
                self._write_block(acts[low:high], concept[low:high], answer[low:high], token[low:high])
        except OSError as error:
            self.abort()
            raise self._disk_error(error) from error
        self._pending = [(acts[cut:], concept[cut:], answer[cut:], token[cut:])] if cut < len(acts) else []
        self._pending_rows = len(acts) - cut

    def _write_block(self, acts: np.ndarray, concept: np.ndarray, answer: np.ndarray, token: np.ndarray) -> None:
        if self.given is None:
            self.normalisation.add(from_stored(acts, self.spec.dtype).float().numpy())
        if self._file is None:
            self._file = self._temporary(len(self._shards)).open("wb")
            self._sink = Sink(self._file)
            self._tar = tarfile.open(fileobj=self._sink, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        start, self._sink.crc = self._sink.position, 0
        key = f"{self.split}-{len(self._shards):06d}-{len(self._blocks):06d}"
        spans: dict[str, tuple[int, int]] = {}
        labels = narrowed(concept)
        if labels.shape[1] == 1:
            labels = labels[:, 0]
        arrays = {"acts": acts, "concept": labels, "answer": answer, **({"token": token} if token.shape[1] else {})}
        for name, array in arrays.items():
            payload = npy.encode(array)
            info = tarfile.TarInfo(f"{key}.{name}.npy")
            info.size, info.mode = len(payload), 0o644
            spans[name] = (self._sink.position + tarfile.BLOCKSIZE, len(payload))
            self._tar.addfile(info, io.BytesIO(payload))
        spans.pop("token", None)  # no reader needs to find it; `alignsae verify` does
        block = Block(key, len(acts), start, self._sink.position - start, crc32=self._sink.crc, **spans)
        self._blocks.append(block)
        if self._sink.position >= self.shard_bytes:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        name = self._name(len(self._shards))
        self._shards.append(Shard(name, self._sink.position, self._sink.sha.hexdigest(), tuple(self._blocks)))
        self._blocks = []

    def _publish(self, manifest: Manifest) -> None:
        """Shards first, manifest last: a folder with a manifest is complete, one without is not a data set."""
        (self.folder / FILE_NAME).unlink(missing_ok=True)
        kept = {shard.name for shard in manifest.shards}
        placed: list[Path] = []
        try:
            for index, shard in enumerate(manifest.shards):
                self._temporary(index).replace(self.folder / shard.name)
                placed.append(self.folder / shard.name)
            manifest.save(self.folder)
        except BaseException:
            for path in placed:
                path.unlink(missing_ok=True)
            raise
        for stale in self.folder.glob(f"{self.split}-*.tar"):
            if stale.name not in kept:
                stale.unlink()
