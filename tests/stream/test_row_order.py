"""The order of rows: every row at most once per epoch, the same for every world size."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.stream import Plan, lanes_of_rank


def data(blocks, digest="0" * 64):
    return SimpleNamespace(block_rows=np.array(blocks), digest=digest)


plans = st.builds(
    lambda blocks, seed, share, lanes, window: (blocks, seed, share * lanes, lanes, window),
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.integers(0, 2**31),
    st.integers(1, 8),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 5),
)


@settings(max_examples=150, deadline=None)
@given(plans, st.integers(0, 3))
def test_every_row_at_most_once_and_only_the_last_batch_is_dropped(drawn, epoch):
    blocks, seed, global_batch, lanes, window = drawn
    assume(sum(blocks) >= global_batch)
    plan = Plan(data(blocks), seed, global_batch, lanes, window)
    assert plan.steps_per_epoch == sum(blocks) // global_batch
    rows = np.concatenate([plan.batch_rows(epoch, step) for step in range(plan.steps_per_epoch)])
    assert len(rows) == plan.steps_per_epoch * global_batch
    assert len(np.unique(rows)) == len(rows) and rows.min() >= 0 and rows.max() < sum(blocks)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_a_step_is_the_same_however_it_is_reached(drawn):
    """In order, out of order, from a fresh plan: state is nothing but the step number."""
    blocks, seed, global_batch, lanes, window = drawn
    assume(sum(blocks) >= global_batch)
    plan = Plan(data(blocks), seed, global_batch, lanes, window)
    steps = list(range(2 * plan.steps_per_epoch))
    forward = [plan.batch_rows(*plan.locate(step)) for step in steps]
    for step in reversed(steps):
        fresh = Plan(data(blocks), seed, global_batch, lanes, window)
        assert np.array_equal(fresh.batch_rows(*fresh.locate(step)), forward[step])
        assert np.array_equal(plan.batch_rows(*plan.locate(step)), forward[step])


@settings(max_examples=60, deadline=None)
@given(plans, st.sampled_from([1, 2, 4, 8]))
def test_ranks_together_read_the_global_batch(drawn, world):
    blocks, seed, global_batch, lanes, window = drawn
    assume(sum(blocks) >= global_batch and lanes % world == 0)
    plan = Plan(data(blocks), seed, global_batch, lanes, window)
    ranks = [lanes_of_rank(lanes, rank, world) for rank in range(world)]
    assert [lane for lanes in ranks for lane in lanes] == list(range(lanes))
    parts = [plan.lane_rows(0, 0, lane) for lanes in ranks for lane in lanes]
    assert np.array_equal(np.concatenate(parts), plan.batch_rows(0, 0))


def test_epochs_seeds_and_data_sets_differ_and_no_row_is_left_out_for_good():
    blocks = [100]  # the hardest case: one block, 36 rows dropped in every epoch
    plan = Plan(data(blocks), 0, 64, 4, 8)
    epochs = [plan.batch_rows(epoch, 0) for epoch in range(60)]
    assert not np.array_equal(epochs[0], epochs[1])
    assert len(np.unique(np.concatenate(epochs))) == 100
    assert not np.array_equal(epochs[0], Plan(data(blocks), 1, 64, 4, 8).batch_rows(0, 0))
    assert not np.array_equal(epochs[0], Plan(data(blocks, "1" * 64), 0, 64, 4, 8).batch_rows(0, 0))


def test_the_order_is_frozen():
    """A change of these rows would make every saved position meaningless: raise the manifest schema instead."""
    plan = Plan(data([5, 7, 6], "ab" * 32), 3, 8, 2, 2)
    assert [plan.batch_rows(e, s).tolist() for e, s in [(0, 0), (0, 1), (7, 1)]] == [
        [0, 2, 14, 15, 4, 6, 9, 11],
        [1, 3, 16, 17, 5, 7, 8, 10],
        [7, 9, 13, 14, 2, 3, 16, 17],
    ]


def test_fewer_blocks_than_lanes_still_fill_every_lane():
    plan = Plan(data([4096, 4096, 3808]), 0, 256, 8, 8)
    assert plan.steps_per_epoch == 46


def test_rows_of_a_step_come_from_all_blocks_of_the_window():
    plan = Plan(data([1000] * 64), 0, 800, 8, 8)
    blocks = plan.lane_rows(0, 3, 2) // 1000
    assert len(np.unique(blocks)) == 8


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ((100, 8, 8), "data.lanes=8 does not divide data.global_batch=100.*data.global_batch=96 or data.lanes=10"),
        ((1024, 8, 8), "300 rows, fewer than one batch.*at most 296"),
        ((0, 8, 8), "data.global_batch=0 must be at least 1"),
        ((8, 8, 0), "data.window=0 must be at least 1"),
    ],
)
def test_impossible_settings_name_possible_ones(settings_, message):
    with pytest.raises(UserError, match=message):
        Plan(data([300]), 0, *settings_)


def test_lanes_that_the_ranks_do_not_divide():
    with pytest.raises(UserError, match=r"data.lanes=8 cannot be split over 3 data ranks; use 2 ranks or data.lanes=9"):
        lanes_of_rank(8, 0, 3)


def test_a_position_of_another_order_is_refused():
    plan = Plan(data([300]), 0, 64, 8, 8)
    assert plan.resume(plan.state(17)) == 17
    with pytest.raises(UserError, match=r"seed=1, this run has 0; restore run.seed"):
        plan.resume({**plan.state(17), "seed": 1})
    with pytest.raises(UserError, match=r"restore data.shards"):
        plan.resume({**plan.state(17), "manifest": "other"})
