"""Hostile bytes: the tar, npy and manifest readers answer with DataError or with arrays inside the bytes they were
given.

The slow test runs for ALIGNSAE_FUZZ_SECONDS (600): `ALIGNSAE_FUZZ_SECONDS=60 pytest -m slow tests/stream/test_fuzz.py`.
"""

import io
import json
import os
import random
import struct
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream.stream_data import rows
from trainer.errors import DataError
from trainer.stream import Block, Manifest, Shard, npy
from trainer.stream.blocks import open_block
from trainer.stream.tar import samples

SECONDS = float(os.environ.get("ALIGNSAE_FUZZ_SECONDS", "600"))
# Beyond the bytes that were given a reader may keep small objects (messages, member tuples), nothing that a header
# sized.
SLACK = 256 * 1024


def good_tar() -> bytes:
    acts, concept, answer = rows(6, 4)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, cut in (("a", slice(0, 3)), ("b", slice(3, 6))):
            for name, array in (("acts", acts), ("concept", concept), ("answer", answer)):
                payload = npy.encode(array[cut].astype(np.float32 if name == "acts" else np.int32))
                info = tarfile.TarInfo(f"{key}.{name}.npy")
                info.size, info.mtime = len(payload), 1.5 if key == "b" else 0
                tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def good_manifest() -> bytes:
    block = Block("k", 2, 0, 4096, (512, 160), (1536, 136), None, 7)
    shard = Shard("train-000000.tar", 10240, "0" * 64, (block,))
    manifest = Manifest(
        width=4,
        dtype="float32",
        model="m",
        hook_point="layer-01",
        mean=[0.0] * 4,
        scale=1.0,
        concepts=["c"],
        answers=["a"],
        rows=2,
        shards=(shard,),
    )
    return manifest.to_json().encode()


TAR, NPY, MANIFEST = good_tar(), npy.encode(np.ones((3, 4), np.float32)), good_manifest()


def read_tar(data: bytes) -> None:
    view = np.frombuffer(data, np.uint8)
    for sample in samples(view, "shard"):
        assert 0 <= sample.start < sample.end <= len(data)
        for member in sample.members.values():
            payload = view[member.offset : member.offset + member.size]
            assert len(payload) == member.size
            read_npy(payload.tobytes())


def read_npy(data: bytes) -> None:
    try:
        array = npy.view(np.frombuffer(data, np.uint8), "payload")
    except DataError:
        return
    assert array.nbytes <= len(data) and array.dtype.kind in "fiu"


def read_manifest(data: bytes) -> None:
    manifest = Manifest.parse(data, "manifest.json")
    assert manifest.rows == manifest.block_rows.sum() and len(manifest.digest) == 64
    for shard, block in manifest.blocks:
        assert block.offset + block.bytes <= manifest.shards[shard].bytes
        extent = np.zeros(min(block.bytes, 1 << 16), np.uint8)
        with pytest.raises(DataError):
            open_block(extent, block, manifest.width, manifest.dtype, len(manifest.concepts), len(manifest.answers))


TARGETS = {"tar": (read_tar, TAR), "npy": (read_npy, NPY), "manifest": (read_manifest, MANIFEST)}


def attempt(target: str, data: bytes) -> None:
    """One input; anything but DataError, or an allocation beyond the input, is a failure."""
    reader, _ = TARGETS[target]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        reader(data)
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    allowed = (60 if target == "manifest" else 2) * len(data) + SLACK  # parsed JSON is larger than its text
    assert tracemalloc.get_traced_memory()[1] - before < allowed


def repaired(data: bytearray) -> bytes:
    """The checksums of all headers made right again, so that the fuzz gets past them."""
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def mutated(source: random.Random, target: str) -> bytes:
    """Flips, cuts, copies, numbers and tokens that matter to the format, on a valid input."""
    data = bytearray(TARGETS[target][1])
    tokens = {
        "tar": [
            b"99999999999\0",
            b"77777777777\0",
            b"\x80" + b"\xff" * 11,
            b"ustar  \0",
            b"x",
            b"2",
            b"../",
            b"12 size=9\n",
        ],
        "npy": [b"'|O'", b"'<f8'", b"(999999999999999,)", b"True", b"()", struct.pack("<H", 65535), b"'descr'"],
        "manifest": [b"1e999", b"-1", b"null", b"9" * 400, b"true", b"[[[[", b'"../x.tar"', b"NaN", b"{}", b"\\ud800"],
    }[target]
    for _ in range(source.randint(1, 6)):
        at = source.randrange(len(data) + 1)
        kind = source.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] = source.randrange(256)
        elif kind == 1:
            del data[at : at + source.choice([1, 8, 512, 4096])]
        elif kind == 2:
            data[at:at] = data[: source.choice([1, 16, 512])]
        elif kind == 3:
            token = source.choice(tokens)
            data[at : at + len(token)] = token
        else:
            data[at:at] = source.choice(tokens)
    return repaired(data) if target == "tar" and source.random() < 0.7 else bytes(data)


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("target", list(TARGETS))
def test_valid_inputs_are_accepted(target):
    TARGETS[target][0](TARGETS[target][1])


@pytest.mark.parametrize("target", list(TARGETS))
def test_a_few_thousand_mutations(target, traced):
    source = random.Random(1)
    for _ in range(1500):
        attempt(target, mutated(source, target))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2048))
def test_arbitrary_bytes(data):
    tracemalloc.start()
    for target in TARGETS:
        attempt(target, data)
    tracemalloc.stop()


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_in_any_field_of_a_manifest(data):
    content = json.loads(MANIFEST)
    place = data.draw(st.sampled_from([content, content["shards"][0], content["shards"][0]["blocks"][0]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(_json)
    tracemalloc.start()
    attempt("manifest", json.dumps(content).encode())
    tracemalloc.stop()


_numbers = (
    st.sampled_from([0, 1, 2, 64, 512, 1024, 4096, 10240, 1 << 33, 1 << 48, 1 << 63, 10**400, -1]) | st.integers()
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_number_in_any_place_of_a_manifest_is_bounded_by_the_bytes(data):
    """Offsets, sizes and counts of all kinds together: what is accepted lies inside what holds it."""
    content = json.loads(MANIFEST)
    shard = content["shards"][0]
    block = shard["blocks"][0]
    places = [
        *((content, name) for name in ("width", "rows")), (shard, "bytes"),
        *((block, name) for name in ("rows", "offset", "bytes", "crc32")),
        *((block[name], i) for name in ("acts", "concept") for i in (0, 1)),
    ]  # fmt: skip
    for place, name in data.draw(st.lists(st.sampled_from(places), max_size=3)):
        place[name] = data.draw(_numbers)
    content["rows"] = data.draw(st.sampled_from([content["rows"], block["rows"]]))
    try:
        manifest = Manifest.parse(json.dumps(content).encode(), "manifest.json")
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    for number, found in manifest.blocks:
        end = found.offset + found.bytes
        assert 0 <= found.offset < end <= manifest.shards[number].bytes
        assert found.rows * manifest.width * 4 < found.acts[1]
        for start, size in (span for span in (found.acts, found.concept, found.answer) if span):
            assert found.offset < start < start + size <= end and found.rows < size


@pytest.mark.slow
def test_fuzz_for_minutes(traced):
    """Ten minutes of mutations over all three readers, from a seed that is printed when it fails."""
    seed = random.SystemRandom().randrange(2**32)
    source, count, stop = random.Random(seed), 0, time.monotonic() + SECONDS
    while time.monotonic() < stop:
        for target in TARGETS:
            data = mutated(source, target)
            try:
                attempt(target, data)
            except BaseException as error:
                raise AssertionError(f"seed {seed}, input {count} of {target}: {data[:2000]!r}") from error
        count += 1
    assert count > 0
