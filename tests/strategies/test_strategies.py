"""One curriculum under every strategy: losses, gradients, state and skipped updates are those of a single process."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ALL_RESUMED, ALL_VARIANTS, FAST_PLAIN, FAST_RESUMED, FAST_VARIANTS, LAYOUTS, SINGLE
from strategy_runs import STEPS, SWITCH, TERMS, metrics, relative

from trainer.checkpoint import load_dictionary

EARLY = [*range(5), *range(SWITCH, SWITCH + 5)]


def fast_and_all(fast: list, everything: list) -> list:
    """Cases of the fast suite, then all of them marked slow."""
    return [*fast, *(pytest.param(case, marks=pytest.mark.slow) for case in everything)]


def label(case: tuple) -> str:
    """`zero3x2` for a layout, `zero3x2-spike` for a variant, `meshx4-to-zero3x2` for a resumed run."""
    if isinstance(case[0], int):
        return f"{case[1]}x{case[0]}"
    return f"{label(case[0])}-{case[1]}" if isinstance(case[1], str) else f"{label(case[0])}-to-{label(case[1])}"


def weights(folder: Path) -> torch.Tensor:
    dictionary, _ = load_dictionary(folder)
    return torch.cat([p.flatten() for p in dictionary.parameters()])


def skipped_steps(folder: Path) -> list[int]:
    return [json.loads(line)["batch"] for line in (folder / "skipped.jsonl").read_text().splitlines()]


def assert_close_runs(ours: list[dict], theirs: list[dict], names=(*TERMS, "grad_norm"), start: int = 0) -> None:
    """Relative difference <= 1e-5 at the first five steps of each stage, <= 1e-4 at every step."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in names if index >= start else ():
            assert relative(a[name], b[name]) <= (1e-5 if index in EARLY else 1e-4), (index, name, a[name], b[name])


@pytest.mark.parametrize(
    "layout", fast_and_all(FAST_PLAIN[1:], [layout for layout in LAYOUTS if layout != SINGLE]), ids=label
)
def test_losses_and_gradients_are_those_of_a_single_process(runs, layout):
    ours, theirs = metrics(runs.plain[layout]), metrics(runs.plain[SINGLE])
    assert len(ours) == STEPS
    assert all(line["loss/bind"] > 0 and line["loss/perp"] > 0 and line["loss/val"] > 0 for line in theirs[SWITCH:])
    assert_close_runs(ours, theirs)
    assert ours[-1]["rows_digest"] == theirs[-1]["rows_digest"]
    reference = weights(runs.plain[SINGLE])
    assert (weights(runs.plain[layout]) - reference).norm() <= 1e-4 * reference.norm()


@pytest.mark.parametrize("case", fast_and_all(FAST_VARIANTS, ALL_VARIANTS), ids=label)
def test_variants_are_those_of_a_single_process(runs, case):
    """Micro-batches, updates that are skipped, dead slots revived in the live engine, no concepts at all, offload."""
    _, variant = case
    ours = metrics(runs.variants[case])
    theirs = metrics(runs.plain[SINGLE] if variant == "offload" else runs.variants[SINGLE, variant])
    if variant in ("overflow", "spike"):
        skipped = skipped_steps(runs.variants[case])
        assert skipped == skipped_steps(runs.variants[SINGLE, variant])
        assert skipped == list(range(SWITCH)) if variant == "overflow" else 0 < len(skipped) < STEPS
        assert_close_runs(ours, theirs, start=SWITCH)
        return
    if variant == "revival":
        dead = [line["dead"] for line in ours]
        assert max(dead[:12]) > 0.2 > dead[12] > 0  # the slots that were dead after 12 steps were revived
        ours, theirs = ours[:SWITCH], theirs[:SWITCH]  # the rate that kills slots in 12 steps amplifies rounding later
    if variant == "bare":
        assert ours[-1]["loss/bind"] == ours[-1]["loss/val"] == 0
    assert_close_runs(ours, theirs, (*TERMS, "grad_norm", "dead"))


@pytest.mark.parametrize("case", fast_and_all(FAST_RESUMED, ALL_RESUMED), ids=label)
def test_a_checkpoint_resumes_under_any_strategy_and_world(runs, case):
    saved, resumed = case
    ended, undisturbed = weights(runs.resumed[case]), weights(runs.plain[saved])
    if saved == resumed:
        assert torch.equal(ended, undisturbed)
    assert (ended - undisturbed).norm() <= 1e-4 * undisturbed.norm()
    lines = metrics(runs.resumed[case])
    assert lines[0]["step"] == 11
    assert lines[-1]["rows_digest"] == metrics(runs.plain[saved])[-1]["rows_digest"]
