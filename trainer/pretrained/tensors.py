"""Tensors of other programs' files, read slice by slice: safetensors and npz. Pickle is never read."""

import shutil
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.dictionary.form import MOST_SLOTS, MOST_WIDTH
from trainer.errors import DataError

_FLOATS = {"F64", "F32", "F16", "BF16"}


class TensorStore(ABC):
    """Named tensors of one file. Slices come as fp32 copies, so that no more of the file is held than was asked for.

    `path` is the file that errors name; `files` are all files whose bytes count.
    """

    path: Path

    @abstractmethod
    def names(self) -> set[str]:
        """Names of the tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises DataError when there is none of this name, or none of floats."""

    @abstractmethod
    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """[end - begin, ...] of a tensor of one or two dimensions, fp32."""

    @abstractmethod
    def columns(self, name: str, begin: int, end: int) -> Tensor:
        """The columns [rows, end - begin] of a matrix, fp32."""

    def whole(self, name: str) -> Tensor:
        """All of a tensor, fp32; meant for small ones."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else self.rows(name, 0, 1)

    def missing(self, name: str) -> DataError:
        """The error for a tensor that is not there."""
        found = ", ".join(sorted(self.names()))[:200]
        return DataError(f"{self.path}: holds no tensor {name} (it holds {found}); is it of another format?")


class SafetensorsStore(TensorStore):
    """A safetensors file by memory map."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._file.__enter__()
            self._names = set(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as safetensors ({error}); fetch it again") from error

    def names(self) -> set[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._names:
            raise self.missing(name)
        part = self._file.get_slice(name)
        if part.get_dtype() not in _FLOATS:
            raise DataError(f"{self.path}: {name} is {part.get_dtype()}, not fp64, fp32, fp16 or bf16")
        return tuple(part.get_shape())

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        if not self.shape(name):
            return self._file.get_tensor(name).float()
        return self._file.get_slice(name)[begin:end].float().contiguous()

    def columns(self, name: str, begin: int, end: int) -> Tensor:
        return self._file.get_slice(name)[:, begin:end].float().contiguous()


class NpzStore(TensorStore):
    """An npz file. Its members are unpacked into `scratch`, one after the other, and read from there by memory map.

    Unpacking checks every member's crc32; a member must have exactly the bytes that its header promises.
    """

    def __init__(self, path: Path, scratch: Path):
        self.path = path
        self._arrays: dict[str, np.ndarray] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for number, member in enumerate(archive.infolist()):
                    if member.filename.endswith(".npy"):
                        unpacked = scratch / f"member-{number:03d}.npy"
                        self._arrays[member.filename.removesuffix(".npy")] = self._unpack(archive, member, unpacked)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise DataError(f"{path} cannot be read as npz ({error}); fetch it again") from error

    @staticmethod
    def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, into: Path) -> np.ndarray:
        with archive.open(member) as source:
            version = np.lib.format.read_magic(source)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"{member.filename} has npy version {version}")
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(source)
            if dtype.kind != "f" or len(shape) > 2 or any(n > MOST_SLOTS for n in shape):
                raise ValueError(
                    f"{member.filename} holds {dtype} of shape {shape}, not one or two dimensions of floats"
                )
            if member.file_size - source.tell() != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
                raise ValueError(f"{member.filename} does not have the bytes of its shape")
        with archive.open(member) as source, into.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        return np.load(into, mmap_mode="r", allow_pickle=False)

    def names(self) -> set[str]:
        return set(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._arrays:
            raise self.missing(name)
        return self._arrays[name].shape

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        array = self._arrays[name]
        return _copied(array[begin:end] if array.ndim else array)

    def columns(self, name: str, begin: int, end: int) -> Tensor:
        return _copied(self._arrays[name][:, begin:end])


def check_sizes(store: TensorStore, width: int, slots: int) -> None:
    """Raise DataError for sizes that no dictionary has."""
    if not 1 <= width <= MOST_WIDTH or not 1 <= slots <= MOST_SLOTS:
        raise DataError(f"{store.path}: {slots} slots of width {width} are no dictionary")


def _copied(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
