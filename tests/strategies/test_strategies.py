"""One curriculum under every strategy: losses, gradients, state and skipped updates are those of a single process."""

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.strategies.curriculum_runs import (
    FEW,
    LAYOUTS,
    ON_TWO,
    SAVED,
    SINGLE,
    STEPS,
    SWITCH,
    TERMS,
    VARIANTS,
    ZERO,
    Layout,
    Runs,
    covering,
    meetings,
)
from tests.support.runs import metrics
from trainer import load
from trainer.checkpoint import load_dictionary

EARLY = [*range(1, 6), *range(SWITCH + 1, SWITCH + 6)]  # the first five steps of each stage
DDP4, MESH4, ZERO3 = Layout("ddp", 4), Layout("mesh", 4), Layout("zero3", 2)
FAST_PLAIN = [*ON_TWO, DDP4, MESH4]
FAST_VARIANTS = [
    (Layout("zero2", 2), "accumulate"),
    (Layout("zero1", 2), "spike"),
    (Layout("dictionary", 2), "overflow"),
    (ZERO3, "revival"),
    (ZERO3, "batch_topk"),
    (ZERO3, "jumprelu"),
    (Layout("ddp", 2), "labels"),
    (Layout("dictionary", 2), "labels"),
]
FAST_RESUMED = [
    (DDP4, DDP4),  # sums over more than two ranks depend on their order
    (Layout("zero1", 2), Layout("zero1", 2)),
    (ZERO3, ZERO3),
    (SINGLE, Layout("dictionary", 2)),
    (MESH4, ZERO3),
    (Layout("zero2", 2), Layout("zero3", 1)),
]
ALL_VARIANTS = [
    *(
        (layout, variant)
        for layout, variant in product(ON_TWO, VARIANTS)
        if variant not in FEW and (variant != "offload" or layout.strategy in ZERO)
    ),
    *((layout, variant) for variant, layouts in FEW.items() for layout in layouts),
    (MESH4, "batch_topk"),
    (MESH4, "jumprelu"),
]
# With gates whose thresholds follow or learn: each strategy as it was saved, and a few under another one.
FAST_GATED = [(ZERO3, Layout("dictionary", 2), "batch_topk"), (ZERO3, Layout("ddp", 2), "jumprelu")]
PAIRS_GATED = [*((layout, layout) for layout in (SINGLE, *ON_TWO, MESH4)), (MESH4, Layout("zero2", 2)), (SINGLE, DDP4)]
ALL_GATED = [(*pair, gate) for pair, gate in product(PAIRS_GATED, ("batch_topk", "jumprelu"))]


def fast_and_slow(fast: list[Any], everything: Iterable[Any]) -> list[Any]:
    """Cases of the fast suite, then the others marked slow."""
    return [*fast, *(pytest.param(case, marks=pytest.mark.slow) for case in everything if case not in fast)]


def label(case: Layout | tuple[Layout, *tuple[object, ...]]) -> str:
    """`zero3x2` for a layout, `zero3x2-spike` for a variant, `meshx4-zero3x2` for a resumed run."""
    return str(case) if isinstance(case, Layout) else "-".join(map(str, case))


def weights(folder: Path) -> torch.Tensor:
    dictionary, _ = load_dictionary(folder / "run")
    return torch.cat([p.flatten() for p in dictionary.parameters()])


def dependence(folder: Path) -> torch.Tensor:
    """Of all free slots on the concepts, at the end of a run."""
    dictionary, _ = load_dictionary(folder / "run")
    return torch.cat([bank.dependence for bank in dictionary.free_banks()])


def thresholds(folder: Path) -> torch.Tensor:
    """Of all free slots, at the end of a run."""
    dictionary, _ = load_dictionary(folder / "run")
    found = [bank.weights().threshold for bank in dictionary.free_banks()]
    return torch.cat([threshold for threshold in found if threshold is not None])


def gains(folder: Path) -> dict[str, float]:
    """Of the concept slots, at the end of a run."""
    return load(folder / "run").gains


def skipped_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]


def assert_close_runs(
    ours: dict[int, dict[str, Any]],
    theirs: dict[int, dict[str, Any]],
    names: Iterable[str] = (*TERMS, "grad_norm"),
    after: int = 0,
) -> None:
    """Relative difference <= 1e-5 at the first five steps of each stage, <= 1e-4 at every step."""
    assert list(ours) == list(theirs)
    for step, name in product(ours, names):
        if step > after and (name in ours[step] or name in theirs[step]):
            tolerance = 1e-5 if step in EARLY else 1e-4
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=tolerance, abs=1e-12), (step, name)


@pytest.mark.parametrize("layout", fast_and_slow(FAST_PLAIN, (x for x in LAYOUTS if x != SINGLE)), ids=label)
def test_losses_and_gradients_are_those_of_a_single_process(runs: Runs, layout: Layout) -> None:
    ours, theirs = metrics(runs.plain(layout)), metrics(runs.plain(SINGLE))
    assert len(ours) == STEPS
    assert gains(runs.plain(SINGLE)) and gains(runs.plain(layout)) == pytest.approx(gains(runs.plain(SINGLE)), rel=1e-3)
    aligned = [theirs[step] for step in range(SWITCH + 1, STEPS + 1)]
    assert all(line["loss/bind"] > 0 and line["loss/perp"] > 0 and line["loss/val"] > 0 for line in aligned)
    assert_close_runs(ours, theirs)
    assert ours[STEPS]["rows_digest"] == theirs[STEPS]["rows_digest"]
    reference = weights(runs.plain(SINGLE))
    assert (weights(runs.plain(layout)) - reference).norm() <= 1e-4 * reference.norm()
    ours_depend, theirs_depend = dependence(runs.plain(layout)), dependence(runs.plain(SINGLE))
    assert theirs_depend.std() > 0.01
    torch.testing.assert_close(ours_depend, theirs_depend, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", fast_and_slow(FAST_VARIANTS, ALL_VARIANTS), ids=label)
def test_variants_are_those_of_a_single_process(runs: Runs, case: tuple[Layout, str]) -> None:
    """Micro-batches, updates that are skipped, dead slots revived in the live engine, no concepts at all, offload,
    concepts that do not exclude each other."""
    layout, variant = case
    folder = runs.variant(layout, variant)
    alone = runs.plain(SINGLE) if variant == "offload" else runs.variant(SINGLE, variant)
    ours, theirs = metrics(folder), metrics(alone)
    if variant in ("overflow", "spike"):
        skipped = skipped_steps(folder)
        assert skipped == skipped_steps(alone)
        assert skipped == list(range(1, SWITCH + 1)) if variant == "overflow" else 0 < len(skipped) < STEPS
        assert_close_runs(ours, theirs, after=SWITCH)
        return
    if variant == "revival":
        dead = {step: line["dead"] for step, line in ours.items()}
        assert max(dead[step] for step in range(1, 13)) > 0.2 > dead[13] > 0  # what was dead after 12 steps was revived
        # The rate that kills slots in 12 steps amplifies rounding later.
        ours, theirs = ({step: lines[step] for step in range(1, SWITCH + 1)} for lines in (ours, theirs))
    if variant == "target_l0":
        assert theirs[STEPS]["sp_weight"] > 1.2 * theirs[1]["sp_weight"]
    if variant == "batch_topk":
        torch.testing.assert_close(thresholds(folder), thresholds(alone), rtol=1e-4, atol=0)
        assert thresholds(folder).unique().numel() == 1
        assert max(line["l0"] for line in ours.values()) > 8 > ours[STEPS]["l0"]  # it has followed
    if variant == "jumprelu":
        torch.testing.assert_close(thresholds(folder), thresholds(alone), rtol=1e-3, atol=0)
        assert thresholds(folder).std() > 0.02 * thresholds(folder).mean()
        assert max(line["loss/pull"] for line in ours.values()) > 0
    if variant == "labels":
        aligned = [ours[step] for step in range(SWITCH + 1, STEPS + 1)]
        assert all(line["loss/sp_concept"] > 0 for line in aligned[1:])  # decoder rows wake up from 0
        assert aligned[-1]["loss/bind"] < aligned[0]["loss/bind"]
    if variant == "bare":
        assert "loss/rec" in ours[SWITCH] and not {"loss/bind", "loss/val"} & ours[SWITCH].keys()
    assert_close_runs(ours, theirs, (*TERMS, "grad_norm", "dead", "sp_weight"))


@pytest.mark.parametrize("case", fast_and_slow(FAST_RESUMED, covering(LAYOUTS)), ids=label)
def test_a_checkpoint_resumes_under_any_strategy_and_world(runs: Runs, case: tuple[Layout, Layout]) -> None:
    saved, resumed = case
    ended, undisturbed = weights(runs.resumed(saved, resumed)), weights(runs.plain(saved))
    if saved == resumed:
        assert torch.equal(ended, undisturbed)
    assert (ended - undisturbed).norm() <= 1e-4 * undisturbed.norm()
    lines = metrics(runs.resumed(saved, resumed))
    assert next(iter(lines)) == SAVED + 1
    assert lines[STEPS]["rows_digest"] == metrics(runs.plain(saved))[STEPS]["rows_digest"]


@pytest.mark.parametrize("case", fast_and_slow(FAST_GATED, ALL_GATED), ids=label)
def test_thresholds_go_on_where_they_were(runs: Runs, case: tuple[Layout, Layout, str]) -> None:
    saved, resumed, gate = case
    ended, undisturbed = runs.resumed(saved, resumed, gate), runs.variant(saved, gate)
    ours, theirs = (torch.cat([weights(folder), thresholds(folder)]) for folder in (ended, undisturbed))
    if saved == resumed:
        assert torch.equal(ours, theirs)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    torch.testing.assert_close(thresholds(ended), thresholds(undisturbed), rtol=1e-3, atol=0)


def test_resumed_pairs_stand_for_all() -> None:
    pairs = covering(LAYOUTS)
    assert {(layout, layout) for layout in LAYOUTS} <= set(pairs)
    tried = set().union(*(meetings(*pair) for pair in pairs))
    assert tried == set().union(*(meetings(*pair) for pair in product(LAYOUTS, LAYOUTS)))
    assert len(pairs) == len(set(pairs)) < len(LAYOUTS) ** 2 / 3
