"""Tensor files: what is written is what safetensors reads, with direct I/O and without."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.checkpoint.files import digest
from trainer.checkpoint.tensorfile import BLOCK, METADATA, TensorFile

SHAPES = st.lists(st.integers(0, 70), min_size=0, max_size=2).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])
NAMES = st.text(st.characters(exclude_characters="\x00", codec="utf-8"), min_size=1, max_size=12)


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES.filter(lambda n: n != "__metadata__"), st.tuples(SHAPES, DTYPES), max_size=5), st.data())
def test_safetensors_reads_what_was_written(tmp_path_factory: pytest.TempPathFactory, parts, data) -> None:
    tensors = {name: filled(*part) for name, part in parts.items()}
    path = tmp_path_factory.mktemp("files") / "unit.safetensors"
    file = TensorFile(tensors)
    listed = file.write(path, {"kernel": data.draw(st.sampled_from(["dense", "sparse"]))})
    assert listed == {"bytes": path.stat().st_size, "xxh3_128": digest(path)}
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in tensors.items())


def test_the_same_memory_is_written_again(tmp_path: Path) -> None:
    weights = torch.randn(300, 40)
    file = TensorFile({"W": weights, "fired": torch.zeros(3, dtype=torch.int64)})
    file.write(tmp_path / "a", {"kernel": "dense"})
    file.tensors["W"].copy_(weights * 2)
    file.write(tmp_path / "b", {"kernel": "sparse"})
    assert torch.equal(load_file(tmp_path / "a")["W"], weights)
    assert torch.equal(load_file(tmp_path / "b")["W"], weights * 2)
    with safe_open(tmp_path / "b", framework="pt") as opened:
        assert opened.metadata() == {"kernel": "sparse"}
    with pytest.raises(ValueError, match="longer"):
        file.write(tmp_path / "c", {"kernel": "x" * (METADATA + BLOCK)})


def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TensorFile({"W": torch.randn(2000, 10)})
    file.write(tmp_path / "direct", {})
    whole = (tmp_path / "direct").read_bytes()
    original, flags = os.open, []

    def refuse(path, flag, *rest):
        flags.append(bool(flag & os.O_DIRECT))
        if flags[-1]:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return original(path, flag, *rest)

    monkeypatch.setattr(os, "open", refuse)
    file.write(tmp_path / "buffered", {})
    assert flags == [True, False] and (tmp_path / "buffered").read_bytes() == whole
