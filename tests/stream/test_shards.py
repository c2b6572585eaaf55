"""Writing shards and manifests, and what stock webdataset makes of them."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream.stream_data import rows, spec, write
from trainer.errors import DataError, UserError
from trainer.stream import Manifest, ShardSpec, ShardWriter


def writer(folder, dtype="float32", **options):
    return ShardWriter(folder, "train", spec(dtype=dtype), **options)


def test_stock_webdataset_reads_the_shards(dataset):
    folder, manifest = dataset(count=300)
    assert len(manifest.shards) > 1
    urls = [str(folder / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    acts, concept, answer = rows(300, 4)
    assert np.array_equal(np.concatenate([s["acts.npy"] for s in samples]), acts)
    assert np.array_equal(np.concatenate([s["concept.npy"] for s in samples]), concept)
    assert np.array_equal(np.concatenate([s["answer.npy"] for s in samples]), answer)
    assert [s["__key__"] for s in samples] == [block.key for _, block in manifest.blocks]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_normalisation_is_that_of_the_stored_rows(dataset, dtype):
    _, manifest = dataset(count=200, width=3, dtype=dtype)
    stored = torch.from_numpy(rows(200, 3)[0]).to(getattr(torch, dtype)).double().numpy()
    mean = stored.mean(axis=0)
    np.testing.assert_allclose(manifest.mean, mean, rtol=1e-12)
    assert math.isclose(manifest.scale**2, ((stored - mean) ** 2).sum(axis=1).mean(), rel_tol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_chunks_of_any_size_make_the_same_data_set(count, rows_per_block, chunks):
    count += 1  # one row alone has no variance
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        acts, concept, answer = rows(count, 4)
        with writer(folder, rows_per_block=rows_per_block, shard_bytes=3000) as w:
            low, turn = 0, 0
            while low < count:
                high = low + chunks[turn % len(chunks)]
                w.write(acts[low:high], concept[low:high], answer[low:high])
                low, turn = high, turn + 1
        pieces = Manifest.load(folder)
        whole = write(Path(name) / "whole", count, rows_per_block=rows_per_block, shard_bytes=3000)
    assert pieces.digest == whole.digest
    assert pieces.rows == count and max(pieces.block_rows) <= rows_per_block


def test_manifest_survives_saving_and_its_digest_names_the_content(dataset, tmp_path):
    folder, manifest = dataset()
    assert Manifest.load(folder) == manifest
    _, again = dataset(name="again")
    assert again.digest == manifest.digest
    _, other = dataset(name="other", count=301)
    assert other.digest != manifest.digest


def test_given_normalisation_and_extra_are_kept(dataset):
    _, manifest = dataset(normalisation=([1.0, 2.0, 3.0, 4.0], 5.0), extra={"prompts": "p.jsonl"})
    assert (manifest.mean, manifest.scale, manifest.extra) == ([1.0, 2.0, 3.0, 4.0], 5.0, {"prompts": "p.jsonl"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"acts": np.full((5, 4), np.nan, np.float32)}, "row 0 .* NaN or infinite"),
        ({"acts": np.full((5, 4), 1e6, np.float32), "dtype": "float16"}, "65504"),
        ({"acts": np.ones((5, 3), np.float32)}, r"acts \[n, 4\]"),
        ({"concept": np.full(5, 3)}, "concept label 3 is outside -2..2"),
        ({"answer": np.array([0, 0, -2, 0, 0])}, "row 2 .* answer -2 is outside -1..4"),
        ({"acts": np.ones((5, 4), np.float32)}, "all 5 activation rows are equal"),
    ],
)
def test_bad_rows_leave_nothing_behind(tmp_path, change, message):
    acts, concept, answer = rows(5, 4)
    values = {"acts": acts, "concept": concept, "answer": answer, "dtype": "float32", **change}
    with pytest.raises(UserError, match=message), writer(tmp_path / "d", dtype=values["dtype"], rows_per_block=2) as w:
        w.write(acts[:0], concept[:0], answer[:0])
        w.write(values["acts"], values["concept"], values["answer"])
    assert list((tmp_path / "d").iterdir()) == []


def test_interrupted_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "d", rows_per_block=8, shard_bytes=2048) as w:
        w.write(*rows(100, 4))
        raise KeyboardInterrupt
    assert list((tmp_path / "d").iterdir()) == []


def test_a_writer_that_failed_stays_failed_and_leftovers_of_a_killed_one_go(tmp_path):
    left = tmp_path / "d" / ".train-000007.tar.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    w = writer(tmp_path / "d")
    assert not left.exists()
    w.abort()
    for call in (lambda: w.write(*rows(5, 4)), w.close):
        with pytest.raises(UserError, match="given up"):
            call()


def test_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path):
    """A file size limit makes the kernel refuse the write in the middle of a shard, as a full disk does."""
    script = f"""
import resource, signal, sys
import numpy as np
from trainer.errors import UserError
from trainer.stream import ShardSpec, ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    spec = ShardSpec(width=64, dtype="float32", concepts=[], answers=[])
    with ShardWriter({str(tmp_path / "d")!r}, "train", spec, shard_bytes=1 << 20) as w:
        for i in range(100):
            w.write(np.random.default_rng(i).normal(size=(4096, 64)), np.full(4096, -1), np.full(4096, -1))
except UserError as error:
    sys.exit(f"refused: {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and done.stderr.startswith("refused: ") and "nothing was kept" in done.stderr
    assert list((tmp_path / "d").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"width": 0}, {}, "width 0 is outside"),
        ({"dtype": "float64"}, {}, "dtype 'float64' is unknown"),
        ({"concepts": ["a", "a"]}, {}, "'concepts' repeats a name"),
        ({"concepts": ["a", "b" * 1001]}, {}, "longer than 1000 characters"),
        ({}, {"rows_per_block": 0}, "rows_per_block=0"),
        ({}, {"rows_per_block": 1 << 30}, "do not fit a tar member; use at most"),
        ({}, {"normalisation": ([0.0, 0.0, 0.0, math.nan], 1.0)}, "4 finite means and a positive scale"),
        ({}, {"normalisation": ([0.0] * 4, 1e300)}, "scale must be positive and of the finite numbers of fp32"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, change, settings, message):
    acts, concept, answer = rows(5, 4)
    values = {"width": 4, "dtype": "float32", "concepts": list("abc"), "answers": list("abcde"), **change}
    with (
        pytest.raises(UserError, match=message),
        ShardWriter(tmp_path / "d", "train", ShardSpec(**values), **settings) as w,
    ):
        w.write(acts, concept, answer)
    assert not list((tmp_path / "d").glob("*"))


def test_names_that_are_found_on_the_way_are_kept_and_checked(tmp_path):
    acts, concept, answer = rows(8, 4)
    for found, outcome in (["a", "b", "c"], None), (["a", "b", "b"], "repeats a name"):
        names: list[str] = []
        values = ShardSpec(width=4, dtype="float32", concepts=names, answers=list("abcdef"))
        with contextlib.ExitStack() as stack:
            if outcome:
                stack.enter_context(pytest.raises(DataError, match=outcome))
            w = stack.enter_context(ShardWriter(tmp_path / str(outcome), "train", values))
            names += found
            w.write(acts, concept, answer)
        if outcome is None:
            assert Manifest.load(tmp_path / "None").concepts == found
        else:
            assert list((tmp_path / outcome).iterdir()) == []


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="not a regular file"):
        Manifest.load(tmp_path)


def test_no_rows_and_a_finished_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no rows"), writer(tmp_path / "d"):
        pass
    write(tmp_path / "d", 300)
    before = sorted(p.name for p in (tmp_path / "d").iterdir())
    with pytest.raises(UserError, match="already holds a finished data set"):
        writer(tmp_path / "d")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == before
    smaller = write(tmp_path / "d", 40, overwrite=True)
    names = sorted(p.name for p in (tmp_path / "d").iterdir())
    assert names == ["manifest.json", *sorted(s.name for s in smaller.shards)]


def test_missing_folder_and_manifest_are_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no manifest.json.*alignsae index"):
        Manifest.load(tmp_path)


def edit(change):
    def apply(data):
        change(data)
        return json.dumps(data)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: "{", "not valid JSON"),
        (lambda data: "[" * 100_000, "not valid JSON"),
        (lambda data: "[]", "'schema' is missing"),
        (edit(lambda d: d.update(schema=2)), "schema 2, this program reads schema 1"),
        (edit(lambda d: d.update(width=5)), "mean has 4 entries but width is 5"),
        (edit(lambda d: d.update(dtype="object")), "dtype 'object' is unknown"),
        (edit(lambda d: d.update(rows=7)), "rows is 7 but"),
        (edit(lambda d: d.update(scale=0)), "scale must be positive"),
        (edit(lambda d: d.update(scale=True)), "finite numbers"),
        (edit(lambda d: d.update(mean=["x"] * 4)), "finite numbers"),
        (edit(lambda d: d.update(mean=[10**400] * 4)), "finite numbers"),
        (edit(lambda d: d.update(schema=10**4000)), "schema 1000"),
        (lambda data: json.dumps({**data, "extra": {"x": "@"}}).replace('"@"', "1e999"), "not valid JSON"),
        (edit(lambda d: d.update(concepts=["a", "a", "b"])), "repeats a name"),
        (edit(lambda d: d.update(shards=[])), "no shard holds any row"),
        (edit(lambda d: d["shards"][0].update(name="../train-000000.tar")), "not a plain .tar file name"),
        (edit(lambda d: d["shards"].append(d["shards"][0])), "same name"),
        (edit(lambda d: d["shards"][0].update(sha256="0")), "64 hex digits"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(rows=10**30)), "outside 1"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(bytes=10**9)), "'bytes' is outside"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(key="a/../b")), "key"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(acts=[512, 10**9])), "lies outside its block"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(acts=None)), "no activations"),
        (edit(lambda d: d["shards"][0]["blocks"].reverse()), "overlap"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(rows=10**9)), "rows=1000000000, but the bytes of acts hold"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(rows=37)), "hold at most 36"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(rows=True)), "rows=True is no whole number"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(rows=2.0)), "rows=2.0 is no whole number"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(offset=7)), "does not start on 512 bytes"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(crc32=1 << 32)), "crc32=4294967296 is no whole number"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(concept=[512])), "concept"),
        (edit(lambda d: d["shards"][0]["blocks"][0].update(answer=[0, 200])), "'answer' of block .* outside its block"),
        (edit(lambda d: d["shards"][0]["blocks"][0].pop("concept")), "no field 'concept'"),
        (edit(lambda d: d.pop("model")), "'model' is missing"),
        (edit(lambda d: d.pop("answers")), "no field 'answers'"),
        (edit(lambda d: d.update(concepts=["\ud800", "b", "c"])), "not valid JSON"),
        (edit(lambda d: d.update(concepts=["a", 1, "c"])), r"concepts\[1\]=1"),
        (edit(lambda d: d.update(scale=1e300)), "scale must be positive and of the finite numbers of fp32"),
        (edit(lambda d: d.update(scale=1e-300)), "scale must be positive"),
        (edit(lambda d: d.update(mean=[1e300] * 4)), "finite numbers"),
        (edit(lambda d: d.update(width=1 << 40)), "width=1099511627776 is no whole number or outside 1.."),
        (edit(lambda d: d.update(extra=[])), "extra"),
    ],
)
def test_bad_manifests_are_refused_in_one_line(dataset, change, message):
    folder, _ = dataset(shard_bytes=1 << 20)
    path = folder / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DataError, match=message) as caught:
        Manifest.load(folder)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
