"""`alignsae repack`: what webdataset decodes becomes blocks, and nothing is unpickled, lost or read another way."""

import io
import json
import pickle
import tarfile
import zipfile

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

from tests.stream.stream_data import CONCEPTS, read, rows
from tools.cli import main
from tools.repacking import samples as foreign_samples
from tools.repacking.samples import read_samples
from trainer.errors import DataError
from trainer.stream import Manifest

BLOCK = 512


def saved(function, *arrays, **named) -> bytes:
    """What numpy.save and its kin write."""
    buffer = io.BytesIO()
    function(buffer, *arrays, **named)
    return buffer.getvalue()


def tar_of(path, named, **options):
    """A tar of (name, bytes) members."""
    with tarfile.open(path, "w", **options) as tar:
        for name, payload in named:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def vectors_tar(path, count=6):
    """Samples of one vector, which begins with its number, and one integer label."""
    return tar_of(path, [(f"{i:03d}.{s}", p) for i in range(count) for s, p in (("npy", vector(i)), ("cls", b"1"))])


def vector(number) -> bytes:
    return saved(np.save, np.arange(number, number + 4, dtype=np.float32))


def repack(sources, out, *options) -> int:
    """The exit code of the command."""
    return main(["repack", *map(str, sources), "--out", str(out), *options])


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("executed",))


ENCODED = {
    "npy": lambda acts: saved(np.save, acts),
    "npz": lambda acts: saved(np.savez, h=acts),
    "acts.npz": lambda acts: saved(np.savez_compressed, h=acts, other=acts[:2]),
    "safetensors": lambda acts: safetensors.torch.save({"h": torch.from_numpy(acts)}),
}


@pytest.mark.parametrize("suffix", ENCODED)
def test_one_vector_samples_become_blocks(tmp_path, suffix):
    acts, concept, answer = rows(40, 4)
    members = []
    for i in range(40):
        name = CONCEPTS[concept[i]] if concept[i] >= 0 else None
        members += [(f"{i:05d}.{suffix}", ENCODED[suffix](acts[i]))]
        members += [(f"{i:05d}.json", json.dumps({"relation": name}).encode())]
        members += [(f"{i:05d}.cls", str(answer[i]).encode())] if answer[i] >= 0 else []
    raw = tar_of(tmp_path / "raw.tar", members)
    out = tmp_path / "out"
    options = ["--acts", suffix, "--concept", "json:relation", "--answer", "cls", "--rows-per-block", "16"]
    options += ["--tensor", "h"] if suffix == "acts.npz" else []
    assert repack([raw], out, *options) == 0
    manifest = Manifest.load(out)
    assert manifest.block_rows.tolist() == [16, 16, 8] and set(manifest.concepts) == set(CONCEPTS)
    got, concepts, answers = read(out)
    assert np.array_equal(got, acts) and np.array_equal(answers, answer)
    names = [manifest.concepts[c] if c >= 0 else None for c in concepts]
    assert names == [CONCEPTS[c] if c >= 0 else None for c in concept]
    # A held-out split shares vocabularies and normalisation; a pipe works once it is permitted.
    held = ["--split", "heldout", "--like", str(out), *options]
    assert repack([f"pipe:cat {raw}"], tmp_path / "held", *held) == 2
    assert repack([f"pipe:cat {raw}"], tmp_path / "held", "--allow-pipe", *held) == 0
    other = Manifest.load(tmp_path / "held")
    assert (other.concepts, other.mean, other.scale) == (manifest.concepts, manifest.mean, manifest.scale)


def test_samples_that_webdataset_writes_are_read(tmp_path):
    names, path = ["born", "works"], tmp_path / "raw-{0..1}.tar"  # a file's name, not a pattern
    with webdataset.TarWriter(str(path)) as sink:
        for i in range(4):
            payload = np.full((2, 3), i, np.float16)
            sink.write(
                {"__key__": f"d/{i}", "H.npy": payload, "txt": names[i % 2], "cls": i, "jpg": b"", "pyd": {"x": 1}}
            )
    fsspec.filesystem("memory").put_file(str(path), "/raw.tar")
    for source in (path, f"file://{path}", "memory://raw.tar"):
        assert (
            repack([source], tmp_path / "out", "--acts", "h.npy", "--concept", "txt", "--answer", "cls", "--overwrite")
            == 0
        )
        acts, concept, answer = read(tmp_path / "out")
        assert acts[:, 0].tolist() == answer.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and acts.dtype == torch.float16
        assert Manifest.load(tmp_path / "out").concepts == names and concept.tolist() == [0, 0, 1, 1] * 2


def test_bits_of_bfloat16_are_read(tmp_path):
    acts = torch.randn(3, 4).bfloat16()
    raw = tar_of(tmp_path / "raw.tar", [("a.npy", saved(np.save, acts.view(torch.uint16).numpy()))])
    assert repack([raw], tmp_path / "out") == 0
    assert Manifest.load(tmp_path / "out").dtype == "bfloat16"
    assert torch.equal(read(tmp_path / "out")[0], acts)


def test_what_webdataset_passes_over_makes_no_sample(tmp_path):
    others = [("README", b"x"), (".hidden", b"x"), ("__meta__/a.npy", b"x"), ("._a.npy", b"x"), ("__index__", b"x")]
    raw = tar_of(tmp_path / "raw.tar", [*others, ("a.npy", vector(0)), ("a.jpg", b"x"), *others, ("b.npy", vector(1))])
    assert repack([raw], tmp_path / "out") == 0
    assert read(tmp_path / "out")[0][:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("suffix", ["pkl", "acts.PTH", "pt", "pyd", "pickle"])
@pytest.mark.parametrize("option", ["--acts", "--concept", "--answer"])
def test_pickles_are_refused_by_name(tmp_path, capsys, option, suffix):
    raw = tar_of(tmp_path / "raw.tar", [("a.npy", vector(0)), (f"a.{suffix}", pickle.dumps(Evil()))])
    assert repack([raw], tmp_path / "out", option, suffix) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "is a pickle" in captured.err and suffix in captured.err
    assert "executed" not in captured.out and not list(tmp_path.glob("out/*"))


def test_pickles_beside_the_activations_are_not_opened(tmp_path, capsys):
    evil = [(f"a.{suffix}", pickle.dumps(Evil())) for suffix in ("pkl", "pth", "pt", "pyd", "npy.pkl", "gz")]
    raw = tar_of(tmp_path / "raw.tar", [*evil[:3], ("a.npy", vector(0)), *evil[3:], ("b.npy", vector(1))])
    assert repack([raw], tmp_path / "out") == 0
    assert "executed" not in capsys.readouterr().out and len(read(tmp_path / "out")[0]) == 2


def lying_npy() -> bytes:
    """An npy header that claims 4 TiB."""
    return vector(0).replace(b"(4,), }" + b" " * 12, b"(1099511627776,), }")


def zip_of(name, payload, method=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, payload)
    return buffer.getvalue()


OBJECTS = saved(np.save, np.array([Evil()], object))


@pytest.mark.parametrize(
    ("suffix", "payload", "message"),
    [
        ("npy", OBJECTS, "object dtype"),
        ("npy", pickle.dumps(Evil()), "not an npy file"),
        ("npy", lying_npy(), "npy header says"),
        ("npy", vector(0)[:-1], "npy header says"),
        ("npy", b"", "not an npy file"),
        ("npy", saved(np.save, np.ones((2, 2, 2), np.float32)), "not one vector or matrix"),
        ("npy", saved(np.save, np.ones(3, np.int32)), "not one vector or matrix"),
        ("npz", zip_of("h.npy", OBJECTS), "object dtype"),
        ("npz", zip_of("h.npy", lying_npy()), "npy header says"),
        ("npz", zip_of("h.pkl", pickle.dumps(Evil())), "not an npy file"),
        ("npz", zip_of("h.npy", vector(0), zipfile.ZIP_LZMA), "compressed in a way"),
        ("npz", zip_of("h.npy", saved(np.save, np.zeros(1 << 20))), "MiB when unpacked"),
        ("npz", pickle.dumps(Evil()), "damaged or not a zip"),
        (
            "npz",
            zip_of("h.npy", vector(0), zipfile.ZIP_STORED).replace(vector(0)[-4:], b"\1\2\3\4"),
            "damaged or not a zip",
        ),
        ("npz", b"junk" + zip_of("h.npy", vector(0)), "damaged or not a zip"),
        ("safetensors", pickle.dumps(Evil()), "damaged or not tensors"),
        ("safetensors", b"\xff" * 8 + b"{}", "damaged or not tensors"),
    ],
)
def test_damaged_and_hostile_activations_are_refused(tmp_path, capsys, monkeypatch, suffix, payload, message):
    monkeypatch.setattr(foreign_samples, "LARGEST_NPZ", 1 << 20)
    raw = tar_of(tmp_path / "raw.tar", [(f"a.{suffix}", payload)])
    assert repack([raw], tmp_path / "out", "--acts", suffix) == 2
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert message in line and "raw.tar: sample 'a' at byte 0" in line and "executed" not in captured.out
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("option", "name", "payload", "message"),
    [
        ("cls", "a.cls", b"born", "not an integer; names are read from .txt"),
        ("txt", "a.txt", b"\xff", "not UTF-8 text"),
        ("other", "a.other", b"\xff", "not UTF-8 text"),
        ("json:x", "a.json", b"{", "not JSON"),
        ("json:x", "a.json", b"[" * 100_000, "not JSON"),
        ("json:x", "a.json", b'{"x": 1.5}', "must be a name, an integer or null"),
        ("json", "a.json", b"{}", "read by field"),
        ("txt:x", "a.txt", b"{}", "read by field"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(tmp_path, capsys, option, name, payload, message):
    raw = tar_of(tmp_path / "raw.tar", [("a.npy", vector(0)), (name, payload)])
    assert repack([raw], tmp_path / "out", "--concept", option) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.glob("out/*"))


def test_labels_that_are_null_or_empty_are_unlabelled(tmp_path):
    members = [
        ("a.json", b"null"),
        ("b.json", b'{"concept": null}'),
        ("c.json", b"[]"),
        ("d.json", b'{"concept": "-1"}'),
    ]
    raw = tar_of(
        tmp_path / "raw.tar", [m for n, p in members for m in ((n, p), (n.replace("json", "npy"), vector(ord(n[0]))))]
    )
    assert repack([raw], tmp_path / "out") == 0
    assert read(tmp_path / "out")[1].tolist() == [-1, -1, -1, 0] and Manifest.load(tmp_path / "out").concepts == ["-1"]


def test_a_json_field_may_list_several_concepts_or_none(tmp_path, capsys):
    fields = [b'["city", "place"]', b'"place"', b"[]", b"null", b'["person"]']
    members = [
        member
        for number, field in enumerate(fields)
        for member in ((f"{number}.npy", vector(number)), (f"{number}.json", b'{"concept": ' + field + b"}"))
    ]
    assert repack([tar_of(tmp_path / "raw.tar", members)], tmp_path / "out") == 0
    assert read(tmp_path / "out")[1].tolist() == [[0, 1], [1, -1], [-2, -1], [-1, -1], [2, -1]]
    assert Manifest.load(tmp_path / "out").concepts == ["city", "place", "person"]
    for field, message in ((b'["a", "a"]', "listed twice"), (b'["a", ["b"]]', "must be a name, an integer or null")):
        raw = tar_of(tmp_path / "bad.tar", [("a.npy", vector(0)), ("a.json", b'{"concept": ' + field + b"}")])
        assert repack([raw], tmp_path / "bad") == 2
        assert message in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.glob("bad/*"))


def test_labels_of_other_suffixes_are_text(tmp_path):
    names = {"a": b"born\n", "b": b" works", "c": b"born"}
    members = [m for k, name in names.items() for m in ((f"{k}.npy", vector(ord(k))), (f"{k}.mp", name))]
    raw = tar_of(tmp_path / "raw.tar", members)
    assert repack([raw], tmp_path / "out", "--concept", "mp") == 0  # msgpack to webdataset
    assert read(tmp_path / "out")[1].tolist() == [0, 1, 0]
    assert Manifest.load(tmp_path / "out").concepts == ["born", "works"]


def test_a_damaged_header_is_reported_where_webdataset_alone_drops_the_rest(tmp_path, capsys):
    path = vectors_tar(tmp_path / "raw.tar")
    data = bytearray(path.read_bytes())
    data[8 * BLOCK] ^= 1  # the header of the third sample
    path.write_bytes(data)
    alone = webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False).decode()
    assert [sample["__key__"] for sample in alone] == ["000", "001"]  # and no word of the others
    assert repack([path], tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"raw.tar: header at byte {8 * BLOCK} is damaged" in error and not list(tmp_path.glob("out/*"))


def test_every_sample_is_read_whatever_byte_is_damaged(tmp_path):
    path = vectors_tar(tmp_path / "raw.tar", count=3)
    good = path.read_bytes()
    used = 2 * 3 * 2 * BLOCK + 2 * BLOCK
    refused = 0
    for offset in range(0, used, 5):
        data = bytearray(good)
        data[offset] ^= 0xFF
        path.write_bytes(data)
        try:
            assert len(list(read_samples(str(path), ["npy", "cls"], False))) == 3
        except DataError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused > used / 5 / 2  # all headers and paddings
    for length in range(0, used, BLOCK // 2):
        path.write_bytes(good[:length])
        with pytest.raises(DataError):
            list(read_samples(str(path), ["npy", "cls"], False))


def test_headers_that_two_readers_take_differently_are_refused(tmp_path):
    raw = tar_of(tmp_path / "a.tar", [("a.npy", vector(0))], format=tarfile.PAX_FORMAT, pax_headers={"path": "b.npy"})
    with pytest.raises(DataError, match=r"sample 'a' at byte \d+: webdataset reads 'b.npy' here"):
        list(read_samples(str(raw), ["npy"], False))
    twice = tar_of(tmp_path / "b.tar", [("a.npy", vector(0)), ("a.NPY", vector(1))])
    with pytest.raises(DataError, match=r"webdataset cannot read this tar: a\.NPY: duplicate file name"):
        list(read_samples(str(twice), ["npy"], False))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.1.npy", [], "sample 'a' at byte 0 has no .npy"),  # a key ends at the first dot
        ("a.npy.gz", ["--acts", "npy.gz"], "only members npy, npz, safetensors hold activations"),
        ("a.npz", ["--acts", "npz", "--tensor", "x"], "holds h, k, but no --tensor 'x'"),
        ("a.npz", ["--acts", "npz"], "holds h, k; choose one with --tensor"),
        ("README", [], "the sources hold no samples"),
    ],
)
def test_sources_without_the_activations_are_refused(tmp_path, capsys, name, options, message):
    raw = tar_of(tmp_path / "raw.tar", [(name, saved(np.savez, h=np.ones(2), k=np.ones(2)))])
    assert repack([raw], tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.glob("out/*"))


def test_the_help_says_what_is_read(capsys):
    with pytest.raises(SystemExit):
        main(["repack", "--help"])
    text = capsys.readouterr().out
    assert all(f".{kind}" in text for kind in (*foreign_samples.KINDS, "pth", "pkl"))
