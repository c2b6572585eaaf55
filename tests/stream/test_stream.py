"""Batches of a running stream."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream.stream_data import rows, write
from trainer.errors import UserError
from trainer.stream import DataConfig, Plan, RowDigest, Stream, lanes_of_rank, step_digest


def setting(folder, **options):
    return DataConfig(**{"shards": str(folder), "global_batch": 32, "lanes": 8, "window": 2, **options})


def make_plan(manifest, seed=0):
    return Plan(manifest, seed, 32, 8, 2)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("threads", [0, 1, 4])
def test_batches_hold_the_rows_of_the_plan(dataset, dtype, threads):
    folder, manifest = dataset(count=250, dtype=dtype)
    plan = make_plan(manifest)
    acts, concept, answer = (torch.from_numpy(v) for v in rows(250, 4))
    with Stream(setting(folder, threads=threads), manifest, plan, range(8)) as stream:
        kept = list(itertools.islice(stream, 3 * plan.steps_per_epoch))  # kept batches must not be overwritten
    for step, batch in enumerate(kept):
        assert batch.step == step and batch.acts.dtype == getattr(torch, dtype)
        assert np.array_equal(batch.row_ids, plan.batch_rows(*plan.locate(step)))
        assert torch.equal(batch.acts, acts[batch.row_ids].to(batch.acts.dtype))
        assert torch.equal(batch.concept, concept[batch.row_ids, None])
        assert torch.equal(batch.answer, answer[batch.row_ids])
        assert torch.equal(batch.positions, torch.arange(32)) and batch.valid.all()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [0, 1, 4])
def test_chains_of_ranks_add_up_over_worlds_threads_and_kill_points(dataset, world, threads):
    """Ranks are stopped at every kind of point, and resumed on another world from the JSON state."""
    folder, manifest = dataset(count=250)
    plan = make_plan(manifest)
    total = 3 * plan.steps_per_epoch + 2
    want = RowDigest()
    for step in range(total):
        want.update(plan.batch_rows(*plan.locate(step)), np.arange(32))
    value, state = 0, plan.state(0)
    for stop in (1, plan.steps_per_epoch - 1, plan.steps_per_epoch, 2 * plan.steps_per_epoch + 3, total):
        start = plan.resume(json.loads(json.dumps(state)))
        chains = []
        for rank in range(world):
            chain = RowDigest(value if rank == 0 else 0)
            with Stream(
                setting(folder, threads=threads), manifest, plan, lanes_of_rank(8, rank, world), start
            ) as stream:
                for batch in itertools.islice(stream, stop - start):
                    chain.update(batch.row_ids, batch.positions)
                state = stream.state()
            chains.append(torch.tensor(chain.signed))  # what an int64 all-reduce sums
        value = RowDigest.combine([torch.stack(chains).sum().item()]).value
    assert value == want.value and len(want.hex()) == 16


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(16, 120),
    rows_per_block=st.integers(1, 40),
    share=st.integers(1, 8),
    lanes=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 3),
    threads=st.sampled_from([0, 2]),
    start=st.integers(0, 20),
)
def test_any_sizes_from_any_step(count, rows_per_block, share, lanes, window, threads, start):
    """Windows smaller than a step, blocks of one row, starts in the middle of a window and of a later epoch."""
    global_batch = min(share * lanes, count - count % lanes)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write(Path(folder) / "d", count, rows_per_block=rows_per_block, shard_bytes=10_000)
        plan = Plan(manifest, 1, global_batch, lanes, window)
        config = DataConfig(
            shards=f"{folder}/d", global_batch=global_batch, lanes=lanes, window=window, threads=threads
        )
        with Stream(config, manifest, plan, range(lanes), start) as stream:
            for step, batch in zip(range(start, start + plan.steps_per_epoch + 3), stream, strict=False):
                assert batch.step == step
                assert np.array_equal(batch.row_ids, plan.batch_rows(*plan.locate(step)))
                assert np.array_equal(batch.acts, rows(count, 4)[0][batch.row_ids.numpy()])


def test_digest_sees_row_position_and_order():
    base = step_digest([1, 2, 3], [0, 1, 2])
    assert base == (step_digest([1, 3], [0, 2]) + step_digest([2], [1])) % 2**64
    assert base == step_digest([3, 1, 2], [2, 0, 1])
    assert len({base, step_digest([2, 1, 3], [0, 1, 2]), step_digest([1, 2, 4], [0, 1, 2]), step_digest([], [])}) == 4
    one, two = RowDigest(), RowDigest()
    for chain, order in ((one, [[1], [2]]), (two, [[2], [1]])):
        for step in order:
            chain.update(step, [0])
    assert one.value != two.value


def test_stall_is_counted_and_a_closed_stream_ends(dataset):
    folder, manifest = dataset()
    stream = Stream(setting(folder), manifest, make_plan(manifest), range(8))
    first = next(stream)
    assert stream.stall_seconds > 0 and stream.state()["step"] == 1
    stream.close()
    assert list(stream) == [] and first.acts[:, 0].equal(first.row_ids.float())
    assert first.to("cpu").step == 0


def test_state_names_no_rank(dataset):
    folder, manifest = dataset()
    with Stream(setting(folder), manifest, make_plan(manifest), range(4, 8), 5) as stream:
        assert stream.state() == make_plan(manifest).state(5)


@pytest.mark.parametrize(
    "change", [{"shards": ""}, {"lanes": 0}, {"threads": -1}, {"shards": "pipe:cat {name}"}, {"quarantine_budget": -1}]
)
def test_impossible_configuration_is_refused(change):
    with pytest.raises(UserError, match=r"data\.") as caught:
        DataConfig(**{"shards": "x", **change}).validate()
    assert "\n" not in str(caught.value)
    DataConfig(shards="x").validate()
