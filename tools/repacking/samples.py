"""Foreign samples as webdataset reads them: its tar iterator, grouping by key and decoders, within our limits.

Left alone webdataset stops silently at a damaged header, unpickles, inflates .gz and opens URLs by running programs. So
files are opened here, the strict reader of trainer/stream/tar.py walks each tar beside it, and nothing but the members
that were asked for reaches a decoder, each of a kind that is listed here.
"""

import io
import re
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from webdataset import Decoder, DecodingError, handle_extension
from webdataset.autodecode import basichandlers
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from trainer.errors import DataError, UserError
from trainer.redact import redact
from trainer.stream import npy
from trainer.stream.blocks import map_file
from trainer.stream.location import is_remote, local_path
from trainer.stream.remote import check_allowed, save
from trainer.stream.tar import Member, members

# Last part of a member's name -> what the member must hold. webdataset's own decoders read all but safetensors.
KINDS = {
    "npy": "an array of plain numbers",
    "npz": "a zip of arrays of plain numbers",
    "safetensors": "tensors",
    "cls": "an integer; names are read from .txt or .json",
    "txt": "UTF-8 text",
    "json": "JSON",
}
ARRAYS = ("npy", "npz", "safetensors")
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib")
LARGEST_NPZ = 1 << 30  # bytes of one .npz when unpacked
_HEAD = 1 << 13  # bytes that hold any npy header which is read here
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset passes over


def kind_of(suffix: str) -> str:
    """`npy` for the suffix `acts.npy`: what decides how a member is decoded."""
    return suffix.rpartition(".")[2].lower()


def check_suffix(option: str, suffix: str) -> None:
    """Raise UserError for a member that is a pickle by its name; no such member is ever opened."""
    if kind_of(suffix) in PICKLES:
        raise UserError(
            f"{option} {suffix}: .{kind_of(suffix)} is a pickle, which can run any program and is never read; "
            "write the values as .npy or .safetensors"
        )


def read_samples(source: str, suffixes: Collection[str], allow_pipe: bool) -> Iterator[dict[str, Any]]:
    """Decoded samples of one tar, in its order: a file, a URL, or `pipe:COMMAND` where allow_pipe permits it.

    A sample holds its members of these suffixes, in lower case, and under `__url__` its place in words. Other
    members are passed over unread. Raises DataError at the first damage, and for a member that belies its suffix.
    """
    check_allowed(source, allow_pipe)
    with tempfile.TemporaryDirectory() as folder:
        path = local_path(source)
        if is_remote(source):
            path = Path(folder) / "source.tar"
            save(source, path)
        yield from _decoded(path, redact(source), {suffix.lower() for suffix in suffixes})


def _decoded(path: Path, where: str, wanted: set[str]) -> Iterator[dict[str, Any]]:
    checked = members(map_file(path), where)
    decoder = Decoder([handle_extension("safetensors", safetensors.torch.load), _decode], pre=[], post=[])
    try:
        with path.open("rb") as stream:
            opened = [{"url": where, "stream": stream}]
            files = tar_file_expander(opened, select_files=lambda name: _suffix(name) in wanted, eof_value=None)
            for sample in group_by_keys(_side_by_side(files, checked, wanted, where), suffixes=wanted):
                _check_arrays(sample)
                yield decoder(sample)
    except DataError:
        raise
    except DecodingError as error:  # foreign bytes make decoders raise struct.error, IndexError and others
        kind = kind_of(error.k)
        raise DataError(
            f"{error.url}: .{error.k} is damaged or not {KINDS[kind]} ({type(error.__cause__).__name__})"
        ) from None
    except Exception as error:
        reason = error.args[0] if isinstance(error, ValueError) and error.args else type(error).__name__
        raise DataError(f"{where}: webdataset cannot read this tar: {reason!s:.200}") from None


def _suffix(name: str) -> str | None:
    """What webdataset takes for the suffix of a member; None where it sees no key or suffix and passes it over."""
    suffix = base_plus_ext(name)[1]
    return None if suffix is None else suffix.lower()


def _side_by_side(
    files: Iterator[dict[str, Any]], checked: Iterator[Member], wanted: set[str], where: str
) -> Iterator[dict[str, Any]]:
    """The files that webdataset finds. Each must be the next of the strict reader: none is lost or read another way.

    Members that nobody asked for keep their place in a sample, without their bytes.
    """
    for member in checked:
        key, suffix = base_plus_ext(member.name)[0], _suffix(member.name)
        if suffix is None or _META.match(member.name):
            continue
        place = f"{where}: sample {key!r:.100} at byte {member.start}"
        file = {"fname": member.name, "data": b""}
        if suffix in wanted:
            file = next(files, {"fname": "", "data": b""})
            if (file["fname"], len(file["data"])) != (member.name, member.size):
                raise DataError(f"{place}: webdataset reads {file['fname']!r:.100} here; write the tar again")
        yield {**file, "__url__": place}
    if extra := next(files, None):
        raise DataError(f"{where}: webdataset reads {extra['fname']!r:.100}, which the headers do not hold")


def _decode(key: str, data: bytes) -> Any:
    """webdataset's decoders for the listed kinds; None leaves the bytes as they are."""
    return basichandlers(key, data) if kind_of(key) in KINDS else None


def _check_arrays(sample: dict[str, Any]) -> None:
    """Refuse arrays whose headers claim other sizes than their bytes, before a decoder allocates what is claimed."""
    for suffix, payload in sample.items():
        place = f"{sample['__url__']}: .{suffix}"
        if kind_of(suffix) == "npy":
            npy.view(np.frombuffer(payload, np.uint8), place)
        elif kind_of(suffix) == "npz":
            _check_npz(payload, place)


def _check_npz(payload: bytes, where: str) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > LARGEST_NPZ:
                raise DataError(f"{where} is larger than {LARGEST_NPZ >> 20} MiB when unpacked; write smaller samples")
            for entry in entries:
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DataError(
                        f"{where}: {entry.filename!r:.100} is compressed in a way that numpy does not write"
                    )
                with archive.open(entry) as file:
                    head = np.frombuffer(file.read(_HEAD), np.uint8)
                whole = np.empty(
                    entry.file_size, np.uint8
                )  # the header alone is looked at: no page behind it is touched
                whole[: len(head)] = head
                npy.view(whole, f"{where}: {entry.filename!r:.100}")
    except DataError:
        raise
    except Exception as error:  # zipfile raises struct.error, NotImplementedError, RuntimeError, zlib.error and others
        raise DataError(f"{where} is damaged or not {KINDS['npz']} ({type(error).__name__})") from None
