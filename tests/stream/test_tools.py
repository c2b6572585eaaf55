"""The commands index and verify, through the command line's entry point."""

import re

import numpy as np
import pytest
import webdataset

from tests.stream.stream_data import CONCEPTS, read, rows, write
from tools.cli import main
from trainer.stream import Manifest


def foreign(path, samples):
    """A tar as stock webdataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(sample)


def test_index_reads_what_stock_webdataset_writes(tmp_path, capsys):
    acts, concept, answer = rows(50, 4)
    for number, cut in enumerate([slice(0, 20), slice(20, 50)]):
        block = {"acts.npy": acts[cut], "concept.npy": concept[cut].astype(np.int32), "answer.npy": answer[cut]}
        foreign(tmp_path / "d" / f"part-{number}.tar", [{"__key__": f"dir/{number}", **block}])
    (tmp_path / "concepts.txt").write_text("\n".join(CONCEPTS))
    arguments = ["--concepts", str(tmp_path / "concepts.txt"), "--model", "m", "--hook-point", "layer-02"]
    assert main(["index", str(tmp_path / "d"), *arguments]) == 0
    assert re.search(r"50 rows of 4 x float32 in 2 blocks, 2 shards", capsys.readouterr().out)
    manifest = Manifest.load(tmp_path / "d")
    assert (manifest.concepts, manifest.model, manifest.hook_point) == (CONCEPTS, "m", "layer-02")
    assert manifest.answers == [f"answer-{i}" for i in range(answer.max() + 1)]
    np.testing.assert_allclose(manifest.mean, acts.astype(np.float64).mean(axis=0), rtol=1e-9)
    for got, want in zip(read(tmp_path / "d"), (acts, concept, answer), strict=True):
        assert np.array_equal(got, want)
    assert main(["verify", str(tmp_path / "d")]) == 0
    assert main(["index", str(tmp_path / "d")]) == 2
    assert main(["index", str(tmp_path / "d"), "--overwrite"]) == 0


def test_index_of_our_own_shards_gives_the_same_blocks(tmp_path):
    before = write(tmp_path / "d", 100)
    (tmp_path / "d" / "manifest.json").unlink()
    assert main(["index", str(tmp_path / "d")]) == 0
    assert Manifest.load(tmp_path / "d").shards == before.shards


def test_index_without_labels_and_with_other_suffixes(tmp_path):
    acts = rows(10, 4)[0].astype(np.float16)
    foreign(tmp_path / "d" / "a.tar", [{"__key__": "a", "h.npy": acts}])
    assert main(["index", str(tmp_path / "d"), "--acts", "h.npy", "--normalisation", str(tmp_path / "none")]) == 2
    assert main(["index", str(tmp_path / "d"), "--acts", "h.npy"]) == 0
    got, concept, answer = read(tmp_path / "d")
    assert np.array_equal(got, acts) and (concept == -1).all() and (answer == -1).all()


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"acts.npy": np.ones((3, 4))}, "activations are float64"),
        ({"acts.npy": np.ones(4, np.float32)}, "use `alignsae repack`"),
        ({"h.npy": np.ones((3, 4), np.float32)}, "has no .acts.npy"),
        ({"acts.npy": np.full((3, 4), np.inf, np.float32)}, "row 0 holds NaN or infinity"),
        ({"acts.npy": np.ones((3, 4), np.float32), "concept.npy": np.array([0, 1, -3])}, "concept label -3 is outside"),
        ({"acts.npy": np.ones((3, 4), np.float32), "answer.npy": np.array([0, 1])}, "not one integer per row"),
    ],
)
def test_index_refuses_what_cannot_be_read(tmp_path, capsys, sample, message):
    foreign(tmp_path / "d" / "a.tar", [{"__key__": "a", **sample}])
    assert main(["index", str(tmp_path / "d")]) == 2
    error = capsys.readouterr().err
    assert message in error and "a.tar" in error
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["a.tar"]


def test_index_refuses_a_folder_without_tars(tmp_path, capsys):
    assert main(["index", str(tmp_path)]) == 2 and "holds no .tar files" in capsys.readouterr().err
    assert main(["index", str(tmp_path / "x")]) == 2 and "no such folder" in capsys.readouterr().err


def test_verify_prints_every_problem_and_fails(tmp_path, capsys):
    manifest = write(tmp_path / "d", 100, shard_bytes=1 << 20)
    assert main(["verify", str(tmp_path / "d")]) == 0
    assert "100 rows in 1 shards are intact" in capsys.readouterr().out
    path = tmp_path / "d" / manifest.shards[0].name
    data = bytearray(path.read_bytes())
    for block in manifest.shards[0].blocks[:2]:
        data[block.acts[0] + 300] ^= 4
    path.write_bytes(data)
    assert main(["verify", str(tmp_path / "d")]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("do not match crc32") == 2 and "sha256 differs" in captured.out
    assert "3 problems" in captured.err


def test_verify_measures_the_reading_rate(tmp_path, capsys):
    write(tmp_path / "d", 500, rows_per_block=50)
    assert main(["verify", str(tmp_path / "d"), "--rate", "--global-batch", "64", "--epochs", "2"]) == 0
    rates = re.findall(r"epoch \d: ([\d.]+)M rows/s", capsys.readouterr().out)
    assert len(rates) == 2
