"""What never finishes stops nothing for longer than data.timeout x (data.retries + 1), and one place retries."""

import logging
import threading
import time
from pathlib import Path

import fsspec
import pytest

from tests.stream.faulty_server import HANGING, HubHandler, http_server, s3_server
from tests.stream.stream_data import write
from trainer.errors import DataError, UserError
from trainer.stream import DataConfig, Manifest, Plan, Stream
from trainer.stream.attempts import Deadline, Refused, Unreachable, retried
from trainer.stream.remote import save

SECRET = "Signature-0123456789"
TIMEOUT, RETRIES = 0.6, 1
SLACK = 5.0  # seconds that a busy machine may add; what this program did without limits took minutes or for ever


def stream_of(url, cache, **options):
    """A stream whose reads end soon; threads and pools are the usual ones."""
    values = {"timeout": TIMEOUT, "retries": RETRIES, "global_batch": 32, "lanes": 4, "window": 2, **options}
    config = DataConfig(shards=url, cache_dir=str(cache), cache_bytes=1 << 20, **values)
    config.validate()
    manifest = Manifest.load(url, allow_pipe=config.allow_pipe, retries=config.retries, timeout=config.timeout)
    return Stream(config, manifest, Plan(manifest, 0, 32, 4, 2), range(4))


def refused_in_time(action, limit=TIMEOUT * (RETRIES + 1)):
    """The one line with which it fails, within the limit."""
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        action()
    assert time.monotonic() - began < limit + SLACK
    text = str(caught.value)
    assert "\n" not in text and SECRET not in text
    return text


@pytest.mark.parametrize("kind", HANGING)
def test_a_server_that_hangs_on_the_manifest_is_given_up_in_one_line(kind, tmp_path):
    write(tmp_path / "d", 100)
    with http_server(tmp_path, share=1.0, faults=(kind,)) as (url, counters, _):
        signed = url.replace("://", f"://user:{SECRET}@") + f"/d?sig={SECRET}"
        counters.share = 0.0
        Manifest.load(signed)  # the first read imports the backend
        counters.share, counters.requests = 1.0, 0
        text = refused_in_time(lambda: Manifest.load(signed, retries=RETRIES, timeout=TIMEOUT))
        assert counters.requests <= RETRIES + 1
    place = url.replace("://", "://***@") + "/d/manifest.json?sig=***"
    assert text.startswith(f"{place}: the file did not arrive within data.timeout=0.6 s, 2 attempts failed")


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("kind", HANGING)
def test_a_server_that_hangs_on_blocks_is_given_up_in_one_line(kind, threads, tmp_path, caplog):
    write(tmp_path / "d", 3000)  # more than is read ahead
    with http_server(tmp_path, faults=(kind,)) as (url, counters, _):
        signed = url + f"/d?sig={SECRET}"
        with stream_of(signed, tmp_path / "cache", threads=threads) as stream, caplog.at_level(logging.INFO):
            next(stream)
            counters.share = 1.0
            text = refused_in_time(lambda: [next(stream) for _ in range(200)])
            began = time.monotonic()
        assert time.monotonic() - began < SLACK  # closing waits for nobody
    assert f"{url}/d/train-" in text and "did not arrive within data.timeout=0.6 s, 2 attempts failed" in text
    assert any(word in text for word in ("its version", "bytes "))
    assert "waiting for http" in caplog.text and "data.timeout=0.6" in caplog.text and SECRET not in caplog.text


def test_closing_does_not_wait_for_a_server_that_hangs(tmp_path):
    write(tmp_path / "d", 300)
    with http_server(tmp_path, faults=("silent",)) as (url, counters, _):
        stream = stream_of(f"{url}/d", tmp_path / "cache", timeout=60.0, retries=9)
        counters.share = 1.0
        failed: list[Exception] = []

        def read():
            try:
                next(stream)
            except DataError as error:
                failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.5)
        began = time.monotonic()
        stream.close()
        reader.join()
        assert time.monotonic() - began < SLACK and "given up" in str(failed[0])


def test_one_place_retries_over_http(tmp_path):
    manifest = write(tmp_path / "d", 64, rows_per_block=32, shard_bytes=1 << 20)
    with http_server(tmp_path, faults=("error",)) as (url, counters, seen):
        with stream_of(f"{url}/d", tmp_path / "cache", retries=3, threads=0, download_threads=1) as stream:
            # The version is known from here on.
            stream.sources[0].blocks.extents._key(0, manifest.shards[0].blocks[0], Deadline(9.0))
            counters.share, before = 1.0, len(seen)
            with pytest.raises(DataError, match=r"ClientResponseError 503, 4 attempts failed"):
                stream.sources[0].rows(0)
            assert len(seen) - before == 4
        counters.requests = 0
        with pytest.raises(DataError, match=r"3 attempts failed"):
            Manifest.load(f"{url}/d", retries=2)
        assert counters.requests == 3


def test_one_place_retries_over_s3(tmp_path, monkeypatch):
    pytest.importorskip("moto.server", reason="needs moto[server], an S3 server")
    pytest.importorskip("s3fs", reason="needs s3fs")
    import boto3
    import s3fs

    write(tmp_path / "d", 100)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server() as (url, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        client.upload_file(str(tmp_path / "d" / "manifest.json"), "bucket", "d/manifest.json")
        Manifest.load("s3://bucket/d")
        for kind in ("error", "cut"):
            faults.share, faults.kinds, faults.requests = 1.0, (kind,), 0
            with pytest.raises(DataError, match=r"s3://bucket/d/manifest.json: \w+, 3 attempts failed"):
                Manifest.load("s3://bucket/d", retries=2)
            assert faults.requests == 3


@pytest.mark.parametrize("url", ["gs://bucket/d", "hf://datasets/me/acts/d"])
@pytest.mark.parametrize("kind", ["error", *HANGING])
def test_one_place_retries_over_hubs_and_they_may_not_hang(url, kind, tmp_path, monkeypatch, online):
    pytest.importorskip({"gs": "gcsfs", "hf": "huggingface_hub"}[url[:2]], reason="needs the extra `remote`")
    write(tmp_path / "d", 100)
    with http_server(tmp_path, kind=HubHandler, faults=(kind,)) as (server, counters, _):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server})
        system = fsspec.get_filesystem_class(url[:2])
        system.clear_instance_cache()
        Manifest.load(url)
        counters.share, counters.requests = 1.0, 0
        timeout = 20.0 if kind == "error" else TIMEOUT  # long enough for retries of the backend's own, if it had any
        text = refused_in_time(lambda: Manifest.load(url, retries=RETRIES, timeout=timeout), (RETRIES + 1) * timeout)
        assert "2 attempts failed" in text and 0 < counters.requests <= RETRIES + 1
        system.clear_instance_cache()


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    url = f"pipe:TOKEN={SECRET} sh -c 'echo $$ >> {pids}; sleep 600 & echo $! >> {pids}; wait' {{name}}"
    text = refused_in_time(lambda: Manifest.load(url, allow_pipe=True, retries=RETRIES, timeout=TIMEOUT))
    assert text.startswith("pipe:sh ...: the output did not arrive within data.timeout=0.6 s, 2 attempts failed")
    started = [int(line) for line in pids.read_text().split()]
    assert len(started) == 2 * (RETRIES + 1)
    until = time.monotonic() + SLACK
    while any(alive(pid) for pid in started) and time.monotonic() < until:  # a signal takes its time
        time.sleep(0.05)
    assert not any(alive(pid) for pid in started)


def test_a_child_that_keeps_the_pipe_open_is_no_way_around_the_limit(tmp_path):
    url = "pipe:sleep 600 & echo {name}"  # the shell is done at once, its child holds the output
    refused_in_time(lambda: Manifest.load(url, allow_pipe=True, retries=RETRIES, timeout=TIMEOUT))


def test_a_file_that_grows_may_take_longer_than_the_limit(tmp_path):
    content = bytes(range(200)) * 3000
    (tmp_path / "f.tar").write_bytes(content)
    with http_server(tmp_path, share=1.0, faults=("trickle",)) as (url, _, _):
        began = time.monotonic()
        save(f"{url}/f.tar", tmp_path / "got", retries=0, timeout=1.0)
        assert time.monotonic() - began > 1.5 and (tmp_path / "got").read_bytes() == content
    save("pipe:for i in 1 2 3 4 5 6; do echo $i; sleep 0.2; done", tmp_path / "got", retries=0, timeout=0.8)
    assert (tmp_path / "got").read_text().split() == list("123456")
    with pytest.raises(DataError, match=r"pipe:sleep \.\.\.: the output did not arrive within data.timeout=0.3 s"):
        save("pipe:sleep 60", tmp_path / "got", retries=0, timeout=0.3)


def test_attempts_and_pauses_fit_the_product_of_both_settings():
    tried = []

    def attempt(deadline):
        tried.append(deadline)
        raise Unreachable("http://h: cut")

    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"http://h: cut, 9 attempts failed; .*data.timeout or data.retries"):
        retried(attempt, 8, 0.05)  # pauses that nothing cuts short are sixteen seconds
    assert len(tried) == 9 and time.monotonic() - began < 9 * 0.05 + SLACK

    def missing(deadline):
        tried.append(deadline)
        raise Refused("http://h: no such file")

    tried.clear()
    with pytest.raises(Refused):
        retried(missing, 3, 0.2)
    assert len(tried) == 1


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9])
def test_impossible_limits_are_refused(timeout):
    with pytest.raises(UserError, match=r"data.timeout="):
        DataConfig(shards="x", timeout=timeout).validate()


@pytest.mark.parametrize("url", ["simplecache::http://user:{}@127.0.0.1:9/d", "filecache::s3://b/d?sig={}"])
def test_chained_protocols_are_refused_without_their_secrets(url):
    url = url.format(SECRET)
    for action in (lambda: Manifest.load(url), lambda: DataConfig(shards=url).validate()):
        with pytest.raises(UserError, match="chained protocols are not read") as caught:
            action()
        assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_an_upper_case_scheme_is_a_url(tmp_path):
    write(tmp_path / "d", 100)
    with http_server(tmp_path) as (url, _, _):
        upper = url.replace("http", "HTTP") + "/d"
        with stream_of(upper, tmp_path / "cache") as stream:
            assert next(stream).valid.all()
        with pytest.raises(DataError) as caught:
            Manifest.load(upper.replace("//", f"//user:{SECRET}@") + "/gone")
    assert "no such file" in str(caught.value) and SECRET not in str(caught.value)
