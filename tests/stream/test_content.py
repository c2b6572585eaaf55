"""Content is checked whenever another file is read, and nothing is sized by a number that no byte vouches for."""

import dataclasses
import itertools
import os
import time
import zlib
from contextlib import closing

import numpy as np
import pytest

from tests.stream.stream_data import poison, recount, write
from trainer.errors import DataError
from trainer.stream import DataConfig, Plan, Stream, npy
from trainer.stream.source import BlockSource


@pytest.mark.parametrize("replaced", ["while it is closed", "not at all", "with the same bytes"])
def test_a_shard_replaced_in_mid_run_is_checked_again_and_no_other(tmp_path, monkeypatch, replaced):
    """More shards than are kept mapped: an epoch opens every file anew."""
    manifest = write(tmp_path / "d", 150 * 8, rows_per_block=8, shard_bytes=1024)
    assert len(manifest.shards) == len(manifest.blocks) == 150
    sums: list[int] = []
    crc32 = zlib.crc32

    def counted(data, *start):
        sums.append(1)
        return crc32(data, *start)

    monkeypatch.setattr(zlib, "crc32", counted)
    config = DataConfig(shards=str(tmp_path / "d"), global_batch=16, lanes=2, window=2, retries=1, threads=0)
    plan = Plan(manifest, 0, 16, 2, 2)
    with Stream(config, manifest, plan, range(2)) as stream:
        for _ in range(plan.steps_per_epoch):
            next(stream)
        assert len(sums) == 150
        path = tmp_path / "d" / manifest.shards[7].name
        data, status = bytearray(path.read_bytes()), path.stat()
        if replaced != "not at all":
            data[manifest.shards[7].blocks[0].acts[0] + 200] ^= replaced == "while it is closed"
            other = tmp_path / "other"
            other.write_bytes(data)
            os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` and `rsync -t` do
            other.replace(path)
        if replaced == "while it is closed":
            with pytest.raises(DataError, match=rf"{path.name}: block .*: bytes do not match crc32"):
                for _ in range(2 * plan.steps_per_epoch):
                    next(stream)
        else:
            for _ in range(2 * plan.steps_per_epoch):
                assert next(stream).valid.all()
            assert len(sums) == 150 + (replaced == "with the same bytes") and stream.counters()["reread_blocks"] == 0


def test_rows_that_are_not_finite_count_once_when_their_shard_is_replaced(tmp_path):
    manifest = write(tmp_path / "d", 64, rows_per_block=16, dtype="float16", shard_bytes=1 << 20)
    poison(tmp_path / "d", manifest, {5: float("nan")}, "float16")
    manifest = recount(tmp_path / "d", manifest)
    path = tmp_path / "d" / manifest.shards[0].name
    with closing(BlockSource(DataConfig(shards=str(tmp_path / "d"), nonfinite_budget=1), manifest)) as source:
        for _ in range(2):
            assert not source.rows(0).valid[5] and source.counters()["nonfinite_rows"] == 1
            (tmp_path / "copy").write_bytes(path.read_bytes())
            (tmp_path / "copy").replace(path)
            source.blocks.close()  # as if many other shards had been read in between


def read_epoch(folder, manifest, budget):
    """What training reads of the data set."""
    config = DataConfig(shards=str(folder), global_batch=16, lanes=2, window=2, retries=1, quarantine_budget=budget)
    plan = Plan(manifest, 0, 16, 2, 2)
    with Stream(config, manifest, plan, range(2)) as stream:
        return list(itertools.islice(stream, plan.steps_per_epoch))


@pytest.mark.parametrize("claim", [21, 10**9, 2**46])
@pytest.mark.parametrize("budget", [0, 10])
def test_more_rows_than_the_bytes_hold_are_refused_at_once(tmp_path, claim, budget):
    """2^46 rows end in MemoryError, 10^9 in minutes of loops, where bytes do not bound them."""
    manifest = write(tmp_path / "d", 32, rows_per_block=16, shard_bytes=1 << 20)
    shard = manifest.shards[0]
    lying = dataclasses.replace(shard.blocks[0], rows=claim)
    shard = dataclasses.replace(shard, blocks=(lying, *shard.blocks[1:]))
    manifest = dataclasses.replace(manifest, shards=(shard,), rows=claim + 16)
    began = time.monotonic()
    with pytest.raises(
        DataError, match=rf"train-000000\.tar: block .* claims {claim} rows, its payloads hold \d+ at most"
    ):
        read_epoch(tmp_path / "d", manifest, budget)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("shape", [(10**30, 0), (0, 10**30), (10**9, 4), (2**62, 2**62)])
def test_npy_headers_that_claim_more_than_their_bytes_are_refused(shape):
    empty = npy.encode(np.zeros((0, 4), np.float32))
    claim = str(shape).encode()
    header = empty.replace(b"(0, 4)", claim).rstrip(b" \n")
    header = header.replace(b" " * (len(claim) - 6), b"", 1)[:127].ljust(127) + b"\n"
    with pytest.raises(DataError, match="npy header says"):
        npy.view(np.frombuffer(header, np.uint8), "acts")


def test_batches_without_any_valid_row_are_handed_out(tmp_path):
    """Missing shards within the budget, one block a batch: the steps go on through batches without a row."""
    manifest = write(tmp_path / "d", 8 * 16, rows_per_block=16, shard_bytes=1024)
    assert len(manifest.shards) == 8
    for shard in manifest.shards[:3]:
        (tmp_path / "d" / shard.name).unlink()
    config = DataConfig(
        shards=str(tmp_path / "d"), global_batch=16, lanes=1, window=1, retries=0, quarantine_budget=100
    )
    with Stream(config, manifest, Plan(manifest, 0, 16, 1, 1), range(1)) as stream:
        batches = list(itertools.islice(stream, 24))
    assert [batch.step for batch in batches] == list(range(24))
    assert sum(not batch.valid.any() for batch in batches) == 9
