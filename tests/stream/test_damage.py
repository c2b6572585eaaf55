"""Damaged shards: found every time, named, never silently dropped, and masked only within a budget."""

import argparse
import io
import itertools
import logging
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stream.stream_data import poison, recount, rows, write
from tools import verify
from trainer.errors import DataError
from trainer.stream import DataConfig, Manifest, Plan, Stream
from trainer.stream.scan import verify_shard
from trainer.stream.tar import members, samples


def silent(size):
    """A progress callback that shows nothing."""


def problems(folder: Path, manifest: Manifest) -> list[str]:
    return [line for shard in manifest.shards for line in verify_shard(folder, manifest, shard, silent)]


def read_epoch(folder, manifest, **options):
    config = DataConfig(shards=str(folder), global_batch=16, lanes=2, window=2, retries=1, **options)
    plan = Plan(manifest, 0, 16, 2, 2)
    with Stream(config, manifest, plan, range(2)) as stream:
        return list(itertools.islice(stream, plan.steps_per_epoch)), stream.counters()


def header_bytes(data: bytes) -> list[int]:
    """Offsets of every byte of every tar header, and of the npy headers."""
    view = np.frombuffer(data, np.uint8)
    found: list[int] = []
    for member in members(view, "shard"):
        found += range(member.start, member.offset + 128)
    return found


def test_every_flipped_header_byte_is_found(tmp_path):
    """Tar and npy headers of a shard, each byte three ways: by the tar reader alone, the block checks, verify."""
    manifest = write(tmp_path / "d", 16, rows_per_block=8, shard_bytes=1 << 20)
    path = tmp_path / "d" / manifest.shards[0].name
    good = path.read_bytes()
    tar_headers = {i for m in members(np.frombuffer(good, np.uint8), "s") for i in range(m.start, m.offset)}
    offsets = header_bytes(good)
    assert len(offsets) == 6 * 640
    for offset in offsets:
        for flip in (0x01, 0x80, 0xFF):
            bad = bytearray(good)
            bad[offset] ^= flip
            if offset in tar_headers:
                with pytest.raises(DataError, match="shard"):
                    list(members(np.frombuffer(bytes(bad), np.uint8), "shard"))
            elif flip == 0xFF:
                path.write_bytes(bad)
                found = problems(tmp_path / "d", manifest)
                assert any("sha256" in line for line in found) and any("crc32" in line for line in found)
    for offset in offsets[:: len(offsets) // 40]:
        bad = bytearray(good)
        bad[offset] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"train-000000\.tar: block .* at byte \d+: bytes do not match crc32"):
            read_epoch(tmp_path / "d", manifest)


def test_truncation_at_every_512th_byte_is_found(tmp_path):
    manifest = write(tmp_path / "d", 24, rows_per_block=8, shard_bytes=1 << 20)
    path = tmp_path / "d" / manifest.shards[0].name
    good = path.read_bytes()
    for size in range(0, len(good), 512):
        path.write_bytes(good[:size])
        found = problems(tmp_path / "d", manifest)
        assert found and str(path) in found[0]
        if size:
            with pytest.raises(DataError, match="cut short"):
                list(members(np.frombuffer(good[:size], np.uint8), "shard"))
        with pytest.raises(DataError, match=rf"train-000000\.tar: has {size} bytes"):
            read_epoch(tmp_path / "d", manifest)
        # With a budget the blocks that are still whole are read.
        lost = sum(block.offset + block.bytes > size for block in manifest.shards[0].blocks)
        batches, counters = read_epoch(tmp_path / "d", manifest, quarantine_budget=3)
        assert counters["quarantined_blocks"] == lost and sum(int((~b.valid).sum()) for b in batches) <= 8 * lost


def test_zeroed_block_swapped_members_and_swapped_blocks_are_found(tmp_path):
    manifest = write(tmp_path / "d", 24, rows_per_block=8, shard_bytes=1 << 20)
    path = tmp_path / "d" / manifest.shards[0].name
    good = path.read_bytes()
    one, two = manifest.shards[0].blocks[:2]

    def swapped(a, b):
        data = bytearray(good)
        data[a[0] : a[0] + a[1]], data[b[0] : b[0] + b[1]] = good[b[0] : b[0] + b[1]], good[a[0] : a[0] + a[1]]
        return bytes(data)

    zeroed = bytearray(good)
    zeroed[one.acts[0] + 128 : one.acts[0] + one.acts[1]] = bytes(one.acts[1] - 128)
    cases = {
        "zeroed": bytes(zeroed),
        "labels of one block": swapped(one.concept, one.answer),
        "payloads of two blocks": swapped(one.acts, two.acts),
        "whole blocks": swapped((one.offset, one.bytes), (two.offset, two.bytes)),
    }
    for name, data in cases.items():
        assert data != good, name
        path.write_bytes(data)
        assert any("crc32" in line for line in problems(tmp_path / "d", manifest)), name
        with pytest.raises(DataError, match="crc32"):
            read_epoch(tmp_path / "d", manifest)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_caller_that_ignores_an_error_skips_no_step(tmp_path, threads):
    manifest = write(tmp_path / "d", 64, rows_per_block=8, shard_bytes=1 << 20)
    path = tmp_path / "d" / manifest.shards[0].name
    data = bytearray(path.read_bytes())
    data[manifest.shards[0].blocks[5].acts[0] + 200] ^= 1
    path.write_bytes(data)
    plan = Plan(manifest, 0, 8, 1, 1)
    config = DataConfig(shards=str(tmp_path / "d"), global_batch=8, lanes=1, window=1, threads=threads, retries=0)
    with Stream(config, manifest, plan, range(1)) as stream:
        steps = []
        for _ in range(12):
            try:
                steps.append(next(stream).step)
            except DataError:
                failed = stream.state()["step"]
        assert steps == list(range(failed)) and failed < 8


def test_missing_shard_and_stray_shard_are_named(tmp_path, capsys):
    manifest = write(tmp_path / "d", 200, shard_bytes=2048)
    gone = tmp_path / "d" / manifest.shards[1].name
    gone.rename(tmp_path / "d" / "train-000099.tar")
    with pytest.raises(DataError, match=rf"{gone.name}: cannot be read .No such file"):
        read_epoch(tmp_path / "d", manifest)
    masked = len(manifest.shards[1].blocks)
    assert read_epoch(tmp_path / "d", manifest, quarantine_budget=masked)[1]["quarantined_blocks"] == masked
    args = argparse.Namespace(folders=[str(tmp_path / "d")], threads=2, rate=False)
    with pytest.raises(DataError, match="2 problems"):
        verify.run(args)
    printed = capsys.readouterr().out
    assert f"{gone}: cannot be read" in printed and "train-000099.tar: not in manifest.json" in printed


def test_damage_within_the_budget_is_masked_and_every_step_kept(tmp_path, caplog):
    manifest = write(tmp_path / "d", 200, rows_per_block=16, shard_bytes=2048)
    shard, block = manifest.blocks[3]
    path = tmp_path / "d" / manifest.shards[shard].name
    data = bytearray(path.read_bytes())
    data[block.acts[0] + 200] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        batches, counters = read_epoch(tmp_path / "d", manifest, quarantine_budget=1)
    assert counters == {"quarantined_blocks": 1, "quarantined_rows": 16, "nonfinite_rows": 0, "reread_blocks": 2}
    assert f"block {block.key}" in caplog.text and "16 rows are masked" in caplog.text
    acts, concept, _ = rows(200, 4)
    masked = 0
    for batch in batches:
        for i, row in enumerate(batch.row_ids.tolist()):
            if row in range(48, 64):
                masked += 1
                assert not batch.valid[i] and batch.concept[i] == batch.answer[i] == -1
                np.testing.assert_allclose(batch.acts[i], manifest.mean, rtol=1e-6)
            else:
                assert batch.valid[i] and batch.concept[i] == concept[row] and np.array_equal(batch.acts[i], acts[row])
    assert masked >= 8 and len(batches) == 200 // 16
    with pytest.raises(DataError, match=r"1 damaged blocks exceed data.quarantine_budget=0"):
        read_epoch(tmp_path / "d", manifest)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_rows_are_counted_and_masked_within_their_budget(tmp_path, dtype, value):
    """A file that passes its checksums and yet holds NaN: written by somebody else, indexed by an older program."""
    manifest = write(tmp_path / "d", 64, rows_per_block=16, dtype=dtype, shard_bytes=1 << 20)
    poison(tmp_path / "d", manifest, {5: value, 40: value}, dtype)
    manifest = recount(tmp_path / "d", manifest)
    with pytest.raises(DataError, match=r"1 rows hold NaN or infinity, first row id (5|40); .*data.nonfinite_budget=0"):
        read_epoch(tmp_path / "d", manifest)
    batches, counters = read_epoch(tmp_path / "d", manifest, nonfinite_budget=2)
    assert counters["nonfinite_rows"] == 2 and counters["quarantined_blocks"] == 0
    invalid = {int(r) for b in batches for r in b.row_ids[~b.valid]}
    assert invalid == {5, 40} and all(torch.isfinite(b.acts).all() for b in batches)
    with pytest.raises(DataError, match=r"2 exceed data.nonfinite_budget=1"):
        read_epoch(tmp_path / "d", manifest, nonfinite_budget=1)
    assert sum("NaN or infinity" in line for line in problems(tmp_path / "d", manifest)) == 2


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "pipe"),
    ],
)
def test_links_and_devices_are_refused(kind, word):
    info = tarfile.TarInfo("a.acts.npy")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(DataError, match=word):
        list(members(archive([(info, b"")]), "shard"))


@pytest.mark.parametrize("name", ["/etc/a.npy", "../a.npy", "x/../../a.npy", "a\nb.npy", "a\\b.npy"])
def test_unsafe_names_are_refused(name):
    with pytest.raises(DataError, match="unsafe name"):
        list(members(archive([(tarfile.TarInfo(name), b"x")]), "shard"))


def test_headers_that_stock_writers_add_are_read():
    """PAX time stamps and long names, folders, GNU magic."""
    long = "f" * 60 + "/" + "k" * 120
    info = tarfile.TarInfo(long + ".acts.npy")
    info.mtime = 1.5
    folder = tarfile.TarInfo("f")
    folder.type = tarfile.DIRTYPE
    data = archive([(folder, b""), (info, b"abc")], tarfile.PAX_FORMAT)
    (sample,) = samples(data, "shard")
    assert sample.key == long and sample.members["acts.npy"].size == 3
    (member,) = members(archive([(tarfile.TarInfo("a.cls"), b"1")], tarfile.GNU_FORMAT), "shard")
    assert member.name == "a.cls"
    with pytest.raises(DataError, match="GNU long name"):
        list(members(archive([(tarfile.TarInfo(long), b"1")], tarfile.GNU_FORMAT), "shard"))
    sized = tarfile.TarInfo("a.npy")
    sized.pax_headers = {"size": "1000000"}
    with pytest.raises(DataError, match="not supported"):
        list(members(archive([(sized, b"1")], tarfile.PAX_FORMAT), "shard"))


def archive(entries, form=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, payload in entries:
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return np.frombuffer(buffer.getvalue(), np.uint8)


def test_bytes_after_the_end_mark_are_found():
    data = archive([(tarfile.TarInfo("a.cls"), b"1")]).copy()
    data[-1] = 1
    with pytest.raises(DataError, match="after the end-of-archive"):
        list(members(data, "shard"))


def test_nothing_is_written_by_reading(tmp_path):
    manifest = write(tmp_path / "d", 64)
    for path in [tmp_path / "d", *(tmp_path / "d").iterdir()]:
        path.chmod(0o555)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory():
        warnings.simplefilter("error")
        batches, _ = read_epoch(tmp_path / "d", manifest)
    assert len(batches) == 4
