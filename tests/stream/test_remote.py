"""Remote shards: the same batches as local ones through failing servers, a bounded shared cache, and silent logs."""

import errno
import itertools
import logging
import multiprocessing
import os
import socket
import traceback
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
import torch
from filelock import FileLock

from tests.stream.faulty_server import HubHandler, http_server, s3_server
from tests.stream.stream_data import write
from trainer.errors import DataError, UserError
from trainer.redact import redact
from trainer.stream import DataConfig, Manifest, Plan, RowDigest, Stream
from trainer.stream.attempts import Deadline
from trainer.stream.cache import BlockCache
from trainer.stream.location import join
from trainer.stream.remote import version

SECRET = "Signature-0123456789"


def setting(url, cache, **options):
    values = {"global_batch": 32, "lanes": 4, "window": 2, "cache_bytes": 1 << 20, "retries": 6, **options}
    return DataConfig(shards=url, cache_dir=str(cache), **values)


def epochs(config, count=2):
    """(digest, all batches, stream) of some epochs."""
    manifest = Manifest.load(config.shards, allow_pipe=config.allow_pipe, retries=config.retries)
    plan = Plan(manifest, 0, config.global_batch, config.lanes, config.window)
    chain = RowDigest()
    with Stream(config, manifest, plan, range(config.lanes)) as stream:
        batches = list(itertools.islice(stream, count * plan.steps_per_epoch))
    for batch in batches:
        chain.update(batch.row_ids, batch.positions)
    return chain.hex(), batches, stream


def same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.row_ids, b.row_ids) and torch.equal(a.acts, b.acts)
        assert torch.equal(a.concept, b.concept) and torch.equal(a.answer, b.answer) and b.valid.all()


@pytest.mark.parametrize("threads", [0, 2])
def test_http_with_failing_requests_gives_the_local_batches(tmp_path, threads):
    write(tmp_path / "d", 600, rows_per_block=16, shard_bytes=8192)
    want, local, _ = epochs(setting(str(tmp_path / "d"), tmp_path / "unused"))
    with http_server(tmp_path, share=0.05) as (url, faults, _):
        got, remote, stream = epochs(setting(f"{url}/d", tmp_path / f"cache{threads}", threads=threads))
        assert faults.failed > 0
    assert got == want and stream.counters()["quarantined_blocks"] == 0
    same(local, remote)


def test_server_without_ranges_is_read_by_whole_shards(tmp_path):
    manifest = write(tmp_path / "d", 600, rows_per_block=16, shard_bytes=8192)
    want, local, _ = epochs(setting(str(tmp_path / "d"), tmp_path / "unused"))
    with http_server(tmp_path, share=0.05, ranges=False) as (url, _, seen):
        got, remote, stream = epochs(setting(f"{url}/d", tmp_path / "cache"))
    assert got == want
    same(local, remote)
    # Shards hold three blocks: fewer downloads than blocks although every block was needed.
    assert len(manifest.shards) <= stream.sources[0].blocks.extents.downloads < len(manifest.blocks)
    assert len(seen) > stream.sources[0].blocks.extents.downloads


def test_pipe_command_only_when_permitted(tmp_path):
    write(tmp_path / "d", 300)
    url = f"pipe:cat {tmp_path}/d/{{name}}"
    with pytest.raises(UserError, match=r"data.allow_pipe=true"):
        epochs(setting(url, tmp_path / "cache"))
    want, local, _ = epochs(setting(str(tmp_path / "d"), tmp_path / "unused"))
    got, remote, _ = epochs(setting(url, tmp_path / "cache", allow_pipe=True))
    assert got == want
    same(local, remote)
    with pytest.raises(DataError, match=r"pipe:false \.\.\.: the command failed"):
        Manifest.load("pipe:false", allow_pipe=True, retries=0)


def test_s3_with_failing_requests_gives_the_local_batches(tmp_path, monkeypatch):
    pytest.importorskip("moto.server", reason="needs moto[server], an S3 server")
    pytest.importorskip("s3fs", reason="needs s3fs")
    import boto3
    import s3fs

    write(tmp_path / "d", 400, rows_per_block=8, shard_bytes=8192)
    want, local, _ = epochs(setting(str(tmp_path / "d"), tmp_path / "unused"))
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with s3_server() as (url, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in (tmp_path / "d").iterdir():
            client.upload_file(str(path), "bucket", f"data/train/{path.name}")
        faults.share = 0.05
        got, remote, _ = epochs(setting("s3://bucket/data/train", tmp_path / "cache"))
        assert faults.failed > 0
    assert got == want
    same(local, remote)


@pytest.mark.parametrize("url", ["gs://bucket/d", "hf://datasets/me/acts/d"])
def test_hubs_with_failing_requests_give_the_local_batches(url, tmp_path, monkeypatch, online):
    pytest.importorskip({"gs": "gcsfs", "hf": "huggingface_hub"}[url[:2]], reason="needs the extra `remote`")
    write(tmp_path / "d", 400, rows_per_block=8, shard_bytes=8192)
    want, local, _ = epochs(setting(str(tmp_path / "d"), tmp_path / "unused"))
    with http_server(tmp_path, share=0.05, kind=HubHandler) as (server, faults, _):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server})
        system = fsspec.get_filesystem_class(url[:2])
        system.clear_instance_cache()
        got, remote, _ = epochs(setting(url, tmp_path / "cache"))
        first = version(f"{url}/train-000000.tar", Deadline(60.0))
        shard = tmp_path / "d" / "train-000000.tar"
        shard.write_bytes(shard.read_bytes() + b"more")
        system.clear_instance_cache()
        assert faults.failed > 0 and first and version(f"{url}/train-000000.tar", Deadline(60.0)) != first
        system.clear_instance_cache()
    assert got == want
    same(local, remote)


def test_cache_serves_a_second_run_and_a_changed_file_is_fetched_again(tmp_path):
    write(tmp_path / "d", 300)
    with http_server(tmp_path) as (url, _, _):
        first = epochs(setting(f"{url}/d", tmp_path / "cache"))
        again = epochs(setting(f"{url}/d", tmp_path / "cache"))
        assert first[2].sources[0].blocks.extents.downloads > 0 and again[2].sources[0].blocks.extents.downloads == 0
        assert first[0] == again[0]
        write(tmp_path / "d", 300, overwrite=True, dtype="float16")
        changed = epochs(setting(f"{url}/d", tmp_path / "cache"))
    assert changed[2].sources[0].blocks.extents.downloads > 0 and changed[1][0].acts.dtype == torch.float16


def test_cache_stays_within_its_bound_and_evicts_by_last_use(tmp_path):
    manifest = write(tmp_path / "d", 3000, rows_per_block=32, shard_bytes=16384)
    bound = 12 * max(block.bytes for _, block in manifest.blocks)
    total = sum(block.bytes for _, block in manifest.blocks)
    assert bound < total / 4
    with http_server(tmp_path) as (url, _, _):
        _, remote, _ = epochs(setting(f"{url}/d", tmp_path / "cache", cache_bytes=bound))
    assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("??/*")) <= bound
    same(epochs(setting(str(tmp_path / "d"), tmp_path / "unused"))[1], remote)
    with http_server(tmp_path) as (url, _, _), pytest.raises(UserError, match=r"data.cache_bytes=10 cannot hold"):
        epochs(setting(f"{url}/d", tmp_path / "cache", cache_bytes=10))

    cache = BlockCache(tmp_path / "lru", 1000)
    for number, key in enumerate(["aaa", "bbb", "ccc"]):
        cache.put(key, bytes(300))
        os.utime(cache.path(key), (number, number))
    assert cache.get("aaa", 300) is not None  # now the youngest
    cache.put("ddd", bytes(300))
    assert cache.get("bbb", 300) is None and cache.get("aaa", 300) is not None and cache.get("ddd", 300) is not None


def test_cache_bound_holds_at_every_moment_with_many_writers(tmp_path):
    cache = BlockCache(tmp_path, 2000)

    def put(number):
        cache.put(f"{number:03d}", bytes(100))
        # Under the lock of the evictions nothing is claimed or removed; a rename in between must not count twice.
        with FileLock(tmp_path / "locks" / "evict"):
            return 100 * len({path.name.strip(".").split(".")[0] for path in tmp_path.glob("??/*")})

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(put, range(120))) <= 2000


def test_cache_folder_that_cannot_be_made_is_one_line(tmp_path):
    write(tmp_path / "d", 300)
    (tmp_path / "file").write_text("")
    with http_server(tmp_path) as (url, _, _), pytest.raises(UserError, match=r"data.cache_dir=.*choose another"):
        epochs(setting(f"{url}/d", tmp_path / "file" / "cache"))


def test_full_disk_under_the_cache_is_one_line_and_leaves_no_half_block(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "d", 300)
    with http_server(tmp_path) as (url, _, _):
        config = setting(f"{url}/d", tmp_path / "cache")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device.*lower data.cache_bytes"):
            epochs(config)
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent.name != "locks"]
        monkeypatch.undo()
        assert epochs(config)[2].counters()["quarantined_blocks"] == 0


def test_damaged_cache_file_is_downloaded_again(tmp_path):
    write(tmp_path / "d", 300)
    with http_server(tmp_path) as (url, _, _):
        first = epochs(setting(f"{url}/d", tmp_path / "cache"))
        for number, path in enumerate((tmp_path / "cache").glob("??/*.block")):
            data = bytearray(path.read_bytes())
            data[700] ^= 1
            path.write_bytes(data if number % 2 else data[:100])
        again = epochs(setting(f"{url}/d", tmp_path / "cache"))
    same(first[1], again[1])
    assert again[2].counters()["reread_blocks"] > 0


def test_a_cache_file_replaced_in_mid_run_is_noticed(tmp_path):
    """The crc is computed once per file: again for one that was put there, not for one that was only read."""
    manifest = write(tmp_path / "d", 300)
    plan = Plan(manifest, 0, 32, 4, 2)
    with http_server(tmp_path) as (url, _, _):
        config = setting(f"{url}/d", tmp_path / "cache", threads=0)
        with Stream(config, manifest, plan, range(4)) as stream:
            first = list(itertools.islice(stream, plan.steps_per_epoch))
            for path in (tmp_path / "cache").glob("??/*.block"):
                data, status = bytearray(path.read_bytes()), path.stat()
                data[700] ^= 1
                (tmp_path / "other").write_bytes(data)
                os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
                (tmp_path / "other").replace(path)
            later = list(itertools.islice(stream, 2 * plan.steps_per_epoch))
            assert stream.counters()["reread_blocks"] > 0
    same(epochs(setting(str(tmp_path / "d"), tmp_path / "unused"), 3)[1], first + later)


def test_damage_at_the_source_is_named_or_masked(tmp_path):
    manifest = write(tmp_path / "d", 300)
    block = manifest.shards[0].blocks[1]
    path = tmp_path / "d" / manifest.shards[0].name
    data = bytearray(path.read_bytes())
    data[block.offset + 600] ^= 1
    path.write_bytes(data)
    for ranges in (True, False):
        with http_server(tmp_path, ranges=ranges) as (url, _, _):
            with pytest.raises(DataError, match=rf"{path.name}: block {block.key} at byte {block.offset}: .*crc32"):
                epochs(setting(f"{url}/d", tmp_path / f"cache{ranges}", retries=1))
            stream = epochs(setting(f"{url}/d", tmp_path / f"cache{ranges}", retries=1, quarantine_budget=1))[2]
            assert stream.counters()["quarantined_blocks"] == 1


def run_process(url, cache, queue):
    """Another rank of the same node."""
    digest, _, stream = epochs(setting(url, cache))
    queue.put((digest, stream.sources[0].blocks.extents.downloads))


def test_processes_of_a_node_share_the_cache(tmp_path):
    manifest = write(tmp_path / "d", 600, rows_per_block=16)
    context = multiprocessing.get_context("spawn")
    with http_server(tmp_path, share=0.02) as (url, _, _):
        queue = context.Queue()
        ranks = [
            context.Process(target=run_process, args=(f"{url}/d", str(tmp_path / "cache"), queue)) for _ in range(3)
        ]
        for rank in ranks:
            rank.start()
        results = [queue.get(timeout=120) for _ in ranks]
        for rank in ranks:
            rank.join()
    assert len({digest for digest, _ in results}) == 1
    # Every block once, but for the few whose download was damaged on the way.
    assert len(manifest.blocks) <= sum(n for _, n in results) <= 1.3 * len(manifest.blocks)
    assert not list((tmp_path / "cache").glob("??/.*"))


def test_dead_server_and_missing_folder_are_one_line(tmp_path):
    write(tmp_path / "d", 300)
    with (
        http_server(tmp_path, share=0.0) as (url, _, _),
        pytest.raises(DataError, match=r"manifest.json: no such file"),
    ):
        Manifest.load(f"{url}/nothing")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/d"
        with pytest.raises(DataError, match=r"manifest.json: Client\w+, 2 attempts failed"):
            Manifest.load(dead, retries=1)
    with pytest.raises(UserError, match="unknown protocol"):
        Manifest.load("nonsense://host/d")


def test_credentials_and_signatures_are_never_shown(tmp_path, caplog, capfd):
    write(tmp_path / "d", 300)
    with caplog.at_level(logging.INFO), http_server(tmp_path, share=0.2) as (url, _, seen):
        signed = url.replace("://", f"://user:{SECRET}@") + f"/d?X-Amz-Signature={SECRET}#{SECRET}"
        epochs(setting(signed, tmp_path / "cache", retries=12))
        assert any(SECRET in path for path in seen)  # it was really sent
        gone = signed.replace("/d?", "/gone?")
        for retries, location in ((0, gone), (0, signed.replace("127.0.0.1", "127.0.0.2"))):
            try:
                Manifest.load(location, retries=retries)
            except DataError:
                text = traceback.format_exc()
                assert SECRET not in text and "127.0.0." in text
            else:
                raise AssertionError("a missing folder was read")
    output = capfd.readouterr()
    assert SECRET not in caplog.text + output.out + output.err
    assert SECRET not in "".join(str(p) for p in (tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize(
    ("location", "shown", "joined"),
    [
        ("https://u:p@h/x/?sig=1", "https://***@h/x/?sig=***", "https://u:p@h/x/n?sig=1"),
        ("s3://bucket/a", "s3://bucket/a", "s3://bucket/a/n"),
        ("/data/a", "/data/a", "/data/a/n"),
        ("file:///data/a", "file:///data/a", "/data/a/n"),
        ("pipe:get --token=1 {name}", "pipe:get ...", "pipe:get --token=1 n"),
    ],
)
def test_locations(location, shown, joined):
    assert redact(location) == shown and join(location, "n") == joined
