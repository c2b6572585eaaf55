"""Turn one-vector WebDataset samples into shards of blocks that are read hundreds of times faster.

Each sample gives one activation vector (or a matrix of them) in a member .npy, .pth (tensors only, no pickled objects) or
.safetensors, and labels from a member of its own or a field of a JSON member:

    alignsae repack raw/*.tar --out data/mine/layer-06/train --acts pth --concept json:relation --answer json:answer

Labels may be names or integers; null and absent members mean unlabelled. A held-out split passes --like with the folder of its train
split, so that both share vocabularies and normalisation.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

from trainer.errors import DataError, UserError
from trainer.redact import redact
from trainer.stream import Manifest, ShardWriter, npy
from trainer.stream.blocks import map_file
from trainer.stream.location import check_allowed, is_remote, local_path
from trainer.stream.manifest import STORED_DTYPES
from trainer.stream.remote import save
from trainer.stream.tar import Sample, samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae repack`."""
    parser.add_argument("sources", nargs="+", metavar="TAR", help="tar files, URLs, or pipe:COMMAND with --allow-pipe")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new split")
    parser.add_argument("--split", default="train", help="name of the split, first part of the shard names")
    parser.add_argument("--acts", default="npy", metavar="SUFFIX", help="member of the activations: npy, acts.pth, ...")
    parser.add_argument("--tensor", help="name of the tensor where a .pth or .safetensors member holds several")
    for name in ("concept", "answer"):
        parser.add_argument(
            f"--{name}",
            default=f"json:{name}",
            metavar="SUFFIX[:FIELD]",
            help=f"member of the {name} label: text such as cls, or a field of a JSON member (default json:{name})",
        )
    parser.add_argument("--dtype", choices=list(STORED_DTYPES), help="stored dtype (default: that of the first sample)")
    parser.add_argument("--like", metavar="FOLDER", help="take vocabularies and normalisation from this split")
    parser.add_argument("--model", default="", help="name of the language model, recorded in the manifest")
    parser.add_argument("--hook-point", default="", help="where the activations were taken, for example layer-06")
    parser.add_argument("--rows-per-block", type=int, default=4096)
    parser.add_argument("--shard-mb", type=int, default=512, help="shard size in MiB (default 512)")
    parser.add_argument("--allow-pipe", action="store_true", help="permit pipe: sources, which run a program")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished data set in --out")


class Labels:
    """Label values of one kind -> indices. Names are numbered as they appear, or looked up where the vocabulary is fixed."""

    def __init__(self, kind: str, source: str, names: list[str] | None):
        self.kind, self.fixed, self.names = kind, names is not None, list(names or [])
        self.suffix, _, self.field = source.partition(":")
        self._index = {name: i for i, name in enumerate(self.names)}
        self._types: set[type] = set()

    def index(self, payload: bytes | None, where: str) -> int:
        """Index of the label in a member; -1 when it is absent or null."""
        value = self._value(payload, where)
        if value is None:
            return -1
        self._types.add(type(value))
        if len(self._types) > 1:
            raise UserError(f"{where}: {self.kind} labels mix names and integers")
        if isinstance(value, int):
            if not -1 <= value < (len(self.names) if self.fixed else 1 << 20):
                raise UserError(f"{where}: {self.kind} label {value} is out of range")
            while len(self.names) <= value:
                self.names.append(f"{self.kind}-{len(self.names)}")
            return value
        if value not in self._index:
            if self.fixed:
                raise UserError(f"{where}: {self.kind} {value!r:.60} does not occur in the split given by --like")
            self._index[value] = len(self.names)
            self.names.append(value)
        return self._index[value]

    def _value(self, payload: bytes | None, where: str) -> int | str | None:
        if payload is None:
            return None
        try:
            text = payload.decode()
            if not self.field:
                text = text.strip()
                return int(text) if text.lstrip("-").isdigit() else text or None
            data = json.loads(text)
            value = data.get(self.field) if isinstance(data, dict) else None
        except (ValueError, RecursionError):
            raise DataError(f"{where}: .{self.suffix} is not readable text or JSON") from None
        if isinstance(value, bool) or not isinstance(value, int | str | None):
            raise DataError(f"{where}: {self.kind} in .{self.suffix} must be a name, an integer or null")
        return value


def run(args: argparse.Namespace) -> None:
    """Read the sources one after the other and write blocks."""
    like = Manifest.load(args.like) if args.like else None
    concepts = Labels("concept", args.concept, like.concepts if like else None)
    answers = Labels("answer", args.answer, like.answers if like else None)
    writer: ShardWriter | None = None
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(unit="row", unit_scale=True, desc="repack"))
        for data, sample, where in _all_samples(args):
            acts = _vectors(_member(data, sample, args.acts), args.acts, args.tensor, where)
            if writer is None:
                writer = stack.enter_context(
                    ShardWriter(
                        args.out,
                        args.split,
                        width=acts.shape[1],
                        dtype=args.dtype or _stored_dtype(acts),
                        concepts=concepts.names,
                        answers=answers.names,
                        model=args.model or (like.model if like else ""),
                        hook_point=args.hook_point or (like.hook_point if like else ""),
                        rows_per_block=args.rows_per_block,
                        shard_bytes=args.shard_mb << 20,
                        normalisation=(like.mean, like.scale) if like else None,
                        overwrite=args.overwrite,
                    )
                )
            if acts.shape[1] != writer.width:
                raise DataError(f"{where}: vector of width {acts.shape[1]}, the first sample has {writer.width}")
            labels = [np.full(len(acts), v.index(_member(data, sample, v.suffix), where)) for v in (concepts, answers)]
            writer.write(acts, *labels)
            bar.update(len(acts))
        if writer is None:
            raise UserError("the sources hold no samples")
        manifest = writer.close()
    print(f"{args.out}: {manifest.rows} rows of {manifest.width} x {manifest.dtype}, digest {manifest.digest[:16]}")


def _all_samples(args: argparse.Namespace) -> Iterator[tuple[np.ndarray, Sample, str]]:
    """(map of the tar, sample, its place in words) over all sources; remote ones go through a temporary file."""
    for source in args.sources:
        check_allowed(source, args.allow_pipe)
        with tempfile.TemporaryDirectory() as folder:
            path = local_path(source)
            if is_remote(source):
                path = Path(folder) / "source.tar"
                save(source, path)
            data = map_file(path)
            for sample in samples(data, redact(source)):
                yield data, sample, f"{redact(source)}: sample {sample.key!r:.100} at byte {sample.start}"


def _member(data: np.ndarray, sample: Sample, suffix: str) -> bytes | None:
    member = sample.members.get(suffix)
    return None if member is None else data[member.offset : member.offset + member.size].tobytes()


def _vectors(payload: bytes | None, suffix: str, name: str | None, where: str) -> torch.Tensor:
    """Activations [n, D] of one sample."""
    if payload is None:
        raise DataError(f"{where} has no .{suffix}; name the member with --acts")
    kind = suffix.rpartition(".")[2]
    value: Any
    try:
        if kind == "npy":
            array = npy.view(np.frombuffer(payload, np.uint8), where).copy()
            value = torch.from_numpy(array)
            value = value.view(torch.bfloat16) if array.dtype == np.uint16 else value
        elif kind in ("pth", "pt"):
            # weights_only refuses every pickled object but tensors and plain containers.
            value = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        elif kind == "safetensors":
            value = safetensors.torch.load(payload)
        else:
            raise UserError(f"--acts {suffix}: only npy, pth, pt and safetensors members are read")
    except UserError:
        raise
    except Exception as e:  # foreign bytes make these parsers raise struct.error, IndexError and others
        raise DataError(
            f"{where}: .{suffix} is damaged or holds objects other than tensors ({type(e).__name__})"
        ) from None
    if isinstance(value, dict):
        if name is None and len(value) > 1:
            raise UserError(f"{where}: .{suffix} holds {', '.join(map(str, value))!s:.200}; choose one with --tensor")
        value = value.get(name) if name is not None else next(iter(value.values()), None)
    if (
        not isinstance(value, torch.Tensor)
        or value.ndim not in (1, 2)
        or not value.is_floating_point()
        or not value.numel()
    ):
        raise DataError(f"{where}: .{suffix} is not one vector or matrix of floating-point numbers")
    return value.reshape(-1, value.shape[-1])


def _stored_dtype(acts: torch.Tensor) -> str:
    name = str(acts.dtype).removeprefix("torch.")
    return name if name in STORED_DTYPES else "float32"
