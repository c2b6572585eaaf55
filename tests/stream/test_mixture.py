"""Several data sets in one stream: exact shares, order and resume a pure function of the step."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.stream.stream_data import CONCEPTS, rows, write
from trainer.errors import UserError
from trainer.stream import (
    DataConfig,
    Mixture,
    Plan,
    RowDigest,
    ShardSpec,
    ShardWriter,
    SourceConfig,
    Sources,
    Stream,
    Stretch,
    lane_rows,
    lanes_of_rank,
    load_manifests,
)

G, LANES, WINDOW = 32, 4, 2
# Three stages: the corpus alone, three to one, one to three. The small source repeats many times, the corpus's share
# changes in the middle of its epochs.
STAGES = [
    Stretch(0, {"corpus": 8}),
    Stretch(5, {"corpus": 6, "small": 2}),
    Stretch(18, {"small": 6, "corpus": 2}),
]
TOTAL = 40


def layout(blocks, digest="0" * 64):
    return SimpleNamespace(block_rows=np.array(blocks), digest=digest)


@pytest.fixture
def mixed(tmp_path):
    """Settings, sources and order of a corpus of 250 rows and a small source of 50, whose labels have other names."""
    write(tmp_path / "corpus", 250)
    spec = ShardSpec(width=4, dtype="float32", concepts=["works", "lives"], answers=["e", "z"])
    with ShardWriter(tmp_path / "small", "train", spec, rows_per_block=16) as writer:
        acts, _, _ = rows(50, 4, seed=1)
        writer.write(acts, np.arange(50) % 3 - 1, np.arange(50) % 3 - 1)
    names = {name: SourceConfig(str(tmp_path / name)) for name in ("corpus", "small")}
    config = DataConfig(sources=names, global_batch=G, lanes=LANES, window=WINDOW, threads=0)
    config.validate()
    sources = Sources(load_manifests(config), first="corpus")
    return config, sources, Mixture(sources.manifests, 0, G, LANES, WINDOW, STAGES)


def test_batches_hold_the_shares_and_rows_of_the_plan(mixed):
    config, sources, order = mixed
    assert sources.manifest.concepts == [*CONCEPTS, "lives"] and sources.manifest.answers == [*"abcde", "z"]
    corpus, small = rows(250, 4)[0], rows(50, 4, seed=1)[0]
    with Stream(config, sources, order, range(LANES)) as stream:
        for step, batch in enumerate(itertools.islice(stream, TOTAL)):
            assert np.array_equal(batch.row_ids, order.step_rows(step))
            ids = batch.row_ids.reshape(LANES, G // LANES)
            share = STAGES[sum(step >= stage.start for stage in STAGES) - 1].rows
            assert ((ids < 250).sum(dim=1) == share["corpus"]).all(), step  # in every lane
            for row, acts, concept, answer in zip(
                batch.row_ids.tolist(), batch.acts.numpy(), batch.concept.flatten().tolist(), batch.answer.tolist(),
                strict=True,
            ):  # fmt: skip
                if row < 250:
                    assert np.array_equal(acts, corpus[row]) and (concept, answer) == (row % 4 - 1, row % 6 - 1)
                else:
                    label = (row - 250) % 3 - 1
                    assert np.array_equal(acts, small[row - 250])
                    assert concept == (-1, CONCEPTS.index("works"), 3)[label + 1]
                    assert answer == (-1, 4, 5)[label + 1]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [0, 3])
def test_digests_over_worlds_threads_and_kills(mixed, world, threads):
    config, sources, order = mixed
    config.threads = threads
    want = RowDigest()
    for step in range(TOTAL):
        want.update(order.step_rows(step), np.arange(G))
    value, state = 0, order.state(0)
    for stop in (1, 5, 6, 17, 18, 23, TOTAL):
        start = order.resume(json.loads(json.dumps(state)))
        chains = []
        for rank in range(world):
            chain = RowDigest(value if rank == 0 else 0)
            with Stream(config, sources, order, lanes_of_rank(LANES, rank, world), start) as stream:
                for batch in itertools.islice(stream, stop - start):
                    chain.update(batch.row_ids, batch.positions)
                state = stream.state()
            chains.append(torch.tensor(chain.signed))
        value = RowDigest.combine([torch.stack(chains).sum().item()]).value
    assert value == want.value


stages = st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0, 1, 2, 3, 5])), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(stages, st.lists(st.integers(1, 40), min_size=1, max_size=8), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_a_source_goes_on_by_epochs_of_its_own_whatever_its_share(drawn, blocks, lanes, window):
    """No row twice in an epoch; a step is the same however it is reached; what stages come later changes nothing."""
    starts = np.cumsum([0, *(steps for steps, _ in drawn)]).tolist()
    stretches = [Stretch(start, {"a": share, "b": 5 - share}) for start, (_, share) in zip(starts, drawn, strict=False)]
    assume(sum(blocks) >= 5 * lanes)

    def build(stretches):
        data = {"a": layout(blocks), "b": layout([60], "1" * 64)}
        return Mixture(data, 0, 5 * lanes, lanes, window, stretches)

    order = build(stretches)
    seen: dict[int, list[int]] = {}
    steps = range(starts[-1] + 7)
    batches = [order.step_rows(step) for step in steps]
    for step in steps:
        part = next((part for part in order.parts(step) if part.source == 0), None)
        mine = batches[step][batches[step] < sum(blocks)]
        share = 0 if part is None else part.share
        assert len(mine) == share * lanes
        if part is not None:
            seen.setdefault(part.epoch, []).extend(mine)
    assert list(seen) == list(range(len(seen)))
    for found in seen.values():
        assert len(np.unique(found)) == len(found)
    for step in reversed(steps):
        assert np.array_equal(build(stretches).step_rows(step), batches[step])
    cut = stretches[: 1 + len(stretches) // 2]
    for step in range(stretches[len(cut)].start if len(cut) < len(stretches) else starts[-1]):
        assert np.array_equal(build(cut).step_rows(step), batches[step])
        assert build(cut).resume(order.state(step)) == step


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.lists(st.integers(1, 30), max_size=3))
def test_one_source_is_read_in_the_order_of_a_plan(blocks, lengths):
    assume(sum(blocks) >= 12)
    plan = Plan(layout(blocks), 3, 12, 4, 2)
    starts = np.cumsum([0, *lengths]).tolist()
    order = Mixture({"a": layout(blocks)}, 3, 12, 4, 2, [Stretch(start, {"a": 3}) for start in starts])
    for step in range(2 * plan.steps_per_epoch + 5):
        assert np.array_equal(order.step_rows(step), plan.step_rows(step))
        assert order.epochs_at(step)["epoch"] == pytest.approx(plan.epochs_at(step)["epoch"])


MIX = {"corpus": 0.75, "small": 0.25}


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"corpse": 1.0}, r"stages.1.mix names 'corpse', but data.sources has corpus, small"),
        ({"corpus": 0.7, "small": 0.2}, r"adds up to 0.9, not 1; the nearest that goes is {corpus: 0.75, small: 0.25}"),
        ({"corpus": 0.7, "small": 0.3}, r"5.6 and 2.4 of its 8 rows, not whole ones; .* {corpus: 0.75, small: 0.25}"),
        ({"corpus": 0.99, "small": 0.01}, r"raise data.global_batch=32 or lower data.lanes=4"),
        ({"corpus": 1.5, "small": -0.5}, r"stages.1.mix.corpus=1.5 must be between 0 and 1"),
        ({"corpus": 0.0}, r"is 0 for every source"),
        ({}, r"stages.1.mix is missing; say how much of a batch comes from corpus, small"),
    ],
)
def test_a_mix_that_cannot_be_names_the_nearest_that_can(mix, message):
    with pytest.raises(UserError, match=message):
        lane_rows(mix, ["corpus", "small"], G, LANES, "stages.1.mix")


def test_shares_are_whole_rows_in_the_order_of_the_mix():
    assert list(lane_rows({"small": 0.25, "corpus": 0.75}, ["corpus", "small"], G, LANES, "").items()) == [
        ("small", 2),
        ("corpus", 6),
    ]
    assert lane_rows({"a": 0.333333, "b": 0.666667}, ["a", "b"], 24, 2, "") == {"a": 4, "b": 8}
    assert lane_rows({"a": 1.0, "b": 0.0}, ["a", "b"], 24, 2, "") == {"a": 12}
    with pytest.raises(UserError, match=r"data.sources is empty"):
        lane_rows({"a": 1.0}, [""], G, LANES, "stages.0.mix")


def test_a_saved_position_is_compared_source_by_source(mixed):
    _, sources, order = mixed
    manifests, state = sources.manifests, order.state(20)

    def build(data, stages=STAGES):
        return Mixture(data, 0, G, LANES, WINDOW, stages)

    other = SimpleNamespace(block_rows=np.array([50]), digest="x")
    with pytest.raises(UserError, match=r"data.sources.small holds other rows .* restore data.sources.small.shards"):
        build({**manifests, "small": other}).resume(state)
    with pytest.raises(UserError, match=r"in the sources corpus, small, this run has data.sources small, corpus"):
        build(dict(reversed(manifests.items()))).resume(state)
    past = [STAGES[0], Stretch(5, {"corpus": 4, "small": 4}), STAGES[2]]
    with pytest.raises(UserError, match=r"data.sources.corpus .* what is past cannot change"):
        build(manifests, past).resume(state)
    assert build(manifests, past).resume(order.state(5)) == 5
    assert build({**manifests, "more": other}, [*STAGES, Stretch(30, {"more": 8})]).resume(state) == 20
    plan = Plan(manifests["corpus"], 0, G, LANES, WINDOW)
    with pytest.raises(UserError, match=r"in the rows of data.shards, this run has data.sources corpus, small"):
        order.resume(plan.state(20))
    with pytest.raises(UserError, match=r"one in several sources, this run has data.shards"):
        plan.resume(state)


def test_sources_that_do_not_go_together(tmp_path, mixed):
    _, sources, _ = mixed
    for change, message in (
        ({"width": 5}, "data.sources.b has width 5, data.sources.a has 4"),
        ({"dtype": "float16"}, "dtype"),
    ):
        manifest = write(tmp_path / message[:20], 40, **change)
        with pytest.raises(UserError, match=message):
            Sources({"a": sources.manifests["corpus"], "b": manifest}, prefix="data.sources.")
    with pytest.raises(UserError, match=r"data.sources.small has 50 rows, fewer than the 64"):
        Mixture(sources.manifests, 0, 2 * G, LANES, WINDOW, [Stretch(0, {"small": 16})])
