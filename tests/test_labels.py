"""Labels of rows: unknown, none, one or several, from a writer's hand to a batch."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream.stream_data import CONCEPTS, read, rows, spec
from tests.stream.stream_data import write as write_rows
from trainer import labels
from trainer.errors import DataError, UserError
from trainer.stream import DataConfig, Manifest, Plan, ShardWriter, Stream

R = len(CONCEPTS)
# What a row says: unknown, none, or concepts in any order.
ROW = st.one_of(st.just([-1]), st.just([-2]), st.lists(st.integers(0, R - 1), min_size=1, max_size=R, unique=True))


def padded(listed, width, place=lambda row, width: row + [-1] * (width - len(row))):
    return np.array([place(row, width) for row in listed], dtype=np.int64).reshape(len(listed), width)


def write(folder, concept, **options):
    acts, _, answer = rows(len(concept), 4)
    with ShardWriter(folder, "train", spec(), **{"rows_per_block": 8} | options) as writer:
        cut = len(concept) // 3  # two calls, of unequal widths where the rows allow it
        writer.write(acts[:cut], labels.narrowed(concept[:cut]), answer[:cut])
        writer.write(acts[cut:], concept[cut:], answer[cut:])
    return Manifest.load(folder)


@settings(max_examples=25, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=40), st.integers(0, 3), st.randoms(use_true_random=False))
def test_labels_come_back_as_they_were_written(listed, spare, random):
    """Wherever a row has its padding, and however wide it was given."""
    width = max(map(len, listed)) + spare

    def anywhere(row, width):
        rest = iter(row)
        places = set(random.sample(range(width), len(row)))
        return [next(rest) if place in places else -1 for place in range(width)]

    with tempfile.TemporaryDirectory() as name:
        manifest = write(Path(name), padded(listed, width, anywhere))
        assert manifest.concepts_per_row == max(map(len, listed))
        _, concept, _ = read(Path(name))
    found = concept.reshape(len(listed), -1)
    np.testing.assert_array_equal(found, padded(listed, manifest.concepts_per_row))
    assert labels.listing(found).tolist() == [row[0] >= 0 for row in listed]
    assert labels.known(found).tolist() == [row[0] != -1 for row in listed]
    member = labels.membership(found, R)
    assert [set(np.flatnonzero(m)) for m in member] == [{c for c in row if c >= 0} for row in listed]


@pytest.mark.parametrize(
    "row, said",
    [
        ([0, 0], "label 0 is listed twice"),
        ([2, -1, 2], "label 2 is listed twice"),
        ([-2, 1], "label -2 .no concept. stands beside another one"),
        ([1, -2], "label -2 .no concept. stands beside another one"),
        ([-2, -2], "label -2 .no concept. stands beside another one"),
        ([-3], "label -3 is outside -2..2"),
        ([0, R], "label 3 is outside -2..2"),
    ],
)
def test_labels_that_mean_nothing_are_refused_with_their_row(tmp_path, row, said):
    concept = padded([[0], [-2], [-1], row], 3)
    acts, _, answer = rows(4, 4)
    with pytest.raises(UserError, match=f"row 3 of .*: concept {said}"), ShardWriter(tmp_path, "train", spec()) as w:
        w.write(acts[:2], concept[:2, 0], answer[:2])
        w.write(acts[2:], concept[2:], answer[2:])
    # The same in a shard that somebody else wrote.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trainer.stream.shards.canonical", lambda values, concepts: values.astype(np.int32))
        write(tmp_path / "theirs", concept, overwrite=True)
    with pytest.raises(DataError, match=f"block train-000000-000000 .*row 3: concept {said}"):
        read(tmp_path / "theirs")


def test_rows_wider_than_the_manifest_says_are_refused(tmp_path):
    manifest = write(tmp_path, padded([[0, 1], [2], [-1]], 2))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "concepts_per_row": 1}))
    with pytest.raises(DataError, match=r"concept is int32 \(3, 2\), not integers \[3\] or \[3, 1 to 1\]"):
        read(tmp_path)
    for value in (0, 257, 1.5):
        path.write_text(json.dumps({**json.loads(path.read_text()), "concepts_per_row": value}))
        with pytest.raises(DataError, match="concepts_per_row"):
            Manifest.load(tmp_path)
    assert manifest.concepts_per_row == 2


def test_blocks_are_as_wide_as_their_rows_and_webdataset_reads_them(tmp_path):
    """So one label a row is stored as [n], and the manifest of such data says nothing of widths."""
    one = write_rows(tmp_path / "one", 20)
    assert "concepts_per_row" not in one.to_json()
    concept = padded([[0], [1]] * 4 + [[-2], [0, 2, 1]] * 4 + [[-1]] * 3, 5)
    write(tmp_path / "several", concept)
    samples = list(webdataset.WebDataset(str(tmp_path / "several" / "train-000000.tar"), shardshuffle=False).decode())
    assert [s["concept.npy"].shape for s in samples] == [(8,), (8, 3), (3,)]
    np.testing.assert_array_equal(samples[1]["concept.npy"], concept[8:16, :3])


def test_unlabelled_rows_may_count_as_having_none(tmp_path):
    concept = padded([[0, 1], [-1], [-2], [2]] * 5, 2)
    manifest = write(tmp_path, concept)
    plan = Plan(manifest, 0, 20, 1, 2)
    for unlabelled, first in (("unknown", -1), ("none", -2)):
        config = DataConfig(shards=str(tmp_path), threads=0, unlabelled=unlabelled)
        with Stream(config, manifest, plan, range(1)) as stream:
            batch = next(stream)
        found = batch.concept[batch.row_ids.argsort()]
        expected = torch.from_numpy(concept).clone()
        expected[1::4, 0] = first
        assert torch.equal(found, expected) and found.is_contiguous()
