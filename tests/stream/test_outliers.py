"""Rows with giant norms: they own neither normalisation nor training, and nothing else changes for their sake."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.strategies.curriculum_runs import CURRICULUM
from tests.stream.stream_data import spec, write
from tests.support.data import ROWS, write_data
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, metrics, train_rank
from tools.cli import main
from trainer.errors import UserError
from trainer.stream import DataConfig, Manifest, Plan, ShardWriter, Stream
from trainer.stream.normalisation import RunningNormalisation

LOUD = {7: 400.0, 130: 900.0, 131: 50.0}


def planted(count: int = 300, width: int = 6) -> np.ndarray:
    """Rows [n, D] of norms of one size about a mean, but for LOUD."""
    acts = np.random.default_rng(0).standard_normal((count, width)) + 3.0
    for row, factor in LOUD.items():
        acts[row % count] *= factor
    return acts


def running(acts: np.ndarray, **options: float) -> RunningNormalisation:
    found = RunningNormalisation(acts.shape[1], **options)
    for block in np.array_split(acts, 7):
        found.add(block)
    return found


def test_mean_and_scale_are_those_of_the_other_rows() -> None:
    acts = planted()
    found, norms = running(acts), np.linalg.norm(acts, axis=1)
    assert found.median_norm == pytest.approx(np.median(norms), rel=0.03)
    mean, scale = found.result("here")
    rest = np.delete(acts, list(LOUD), axis=0)
    np.testing.assert_allclose(mean, rest.mean(axis=0), rtol=1e-9)
    assert scale == pytest.approx(np.sqrt(((rest - rest.mean(axis=0)) ** 2).sum(axis=1).mean()), rel=1e-9)
    assert running(acts, max_norm=0.0).result("here")[1] > 10 * scale


def test_ordinary_rows_keep_their_numbers_to_the_last_bit() -> None:
    acts = np.delete(planted(), list(LOUD), axis=0)
    assert running(acts).result("here") == running(acts, max_norm=0.0).result("here")


@pytest.mark.parametrize("rows", [np.zeros((9, 3)), np.vstack([np.zeros((9, 3)), np.ones((1, 3))])])
def test_rows_of_norm_0_have_no_median(rows: np.ndarray) -> None:
    assert running(rows).median_norm is None


def test_the_median_is_no_part_of_the_identity_of_the_data(tmp_path: Path) -> None:
    manifest = write(tmp_path / "d")
    assert manifest.median_norm is not None
    assert replace(manifest, median_norm=None).digest == manifest.digest
    assert "median_norm" not in replace(manifest, median_norm=None).to_json()
    replace(manifest, median_norm=None).save(tmp_path / "d")
    assert Manifest.load(tmp_path / "d").median_norm is None


def test_a_batch_holds_the_same_rows_and_says_which_are_outliers(tmp_path: Path) -> None:
    acts = planted()
    with ShardWriter(tmp_path / "d", "train", spec(6), rows_per_block=32) as writer:
        writer.write(acts, np.zeros(300, int), np.zeros(300, int))
    manifest = Manifest.load(tmp_path / "d")
    plan = Plan(manifest, 0, 60, 2, 4)
    found = {}
    for most in (10.0, 0.0):
        config = DataConfig(shards=str(tmp_path / "d"), threads=0, max_norm=most)
        with Stream(config, manifest, plan, range(2)) as stream:
            found[most] = [next(stream) for _ in range(5)]
    for masked, whole in zip(found[10.0], found[0.0], strict=True):
        assert torch.equal(masked.row_ids, whole.row_ids) and torch.equal(masked.acts, whole.acts)
        assert whole.valid.all() and not whole.outlier.any()
        assert torch.equal(masked.outlier, ~masked.valid)
    assert {int(row) for batch in found[10.0] for row in batch.row_ids[batch.outlier]} == set(LOUD)


def test_outliers_have_no_weight_and_are_counted_on_any_number_of_ranks(tmp_path: Path) -> None:
    """As if the rows of a batch were those that are left; every epoch meets each outlier once."""
    data = write_data(tmp_path / "data", dtype="float32", factors=dict.fromkeys((3, 40, 41, 300), 1000.0))
    manifest = Manifest.load(data)
    assert manifest.median_norm is None  # a normalisation that was given has none
    codes = torch.linalg.vector_norm(torch.tensor(manifest.mean))
    replace(manifest, median_norm=float(codes) + 4.0).save(data)
    changes = {**CURRICULUM, "stages": [{"name": "pretrain", "steps": ROWS // 32}]}
    for world, name in ((1, "single"), (2, "ddp")):
        run_ranks(world, train_rank, arguments(tmp_path / name, data, f"parallel.strategy={name}", changes=changes))
    alone, both = metrics(tmp_path / "single"), metrics(tmp_path / "ddp")
    last = alone[ROWS // 32]
    assert 0 < last["outliers"] <= 4 and last["outliers"] == both[ROWS // 32]["outliers"]
    assert last["rows_digest"] == both[ROWS // 32]["rows_digest"]
    assert max(line["loss/rec"] for line in alone.values()) < 100
    for step, line in alone.items():
        assert both[step]["loss/rec"] == pytest.approx(line["loss/rec"], rel=1e-4)


def test_evaluation_reports_with_and_without(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_data(tmp_path / "data", width=6, concepts=[])
    acts = planted()
    manifest = Manifest.load(data)
    with ShardWriter(
        tmp_path / "heldout", "heldout", replace(spec(6), concepts=[], answers=[]),
        normalisation=(manifest.mean, manifest.scale),
    ) as writer:  # fmt: skip
        writer.write(acts, np.full(300, -1), np.full(300, -1))
    stages = {"stages": [{"name": "pretrain", "steps": 2}]}
    argv = arguments(tmp_path, data, changes={**CURRICULUM, **stages})
    run_ranks(1, train_rank, argv)
    split = str(tmp_path / "heldout")
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--train", str(data), "--heldout", split]) == 0
    shown = capsys.readouterr().out
    assert "heldout: without 3 rows of giant norm" in shown and "train: without" not in shown


@pytest.mark.parametrize("most", [0.5, 1.0, -3.0, float("inf")])
def test_a_bound_that_leaves_nothing_is_refused(most: float) -> None:
    with pytest.raises(UserError, match=r"data.max_norm"):
        DataConfig(shards="x", max_norm=most).validate()
