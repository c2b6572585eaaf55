"""One curriculum under every strategy: losses, gradients, state and skipped updates are those of a single process."""

import math

import pytest
import torch
from conftest import LAYOUTS, RESUMED, VARIANTS
from strategy_runs import STEPS, SWITCH, TERMS, metrics, relative

from trainer.checkpoint import load_dictionary

EARLY = [*range(5), *range(SWITCH, SWITCH + 5)]
PLAIN = [(world, name) for world in LAYOUTS for name in LAYOUTS[world] if name != "single"]


def weights(folder) -> torch.Tensor:
    dictionary, _ = load_dictionary(folder)
    return torch.cat([p.flatten() for p in dictionary.parameters()])


def assert_close_runs(ours: list[dict], theirs: list[dict], names=(*TERMS, "grad_norm")) -> None:
    """Relative difference <= 1e-5 at the first five steps of each stage, <= 1e-4 at every step."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in names:
            assert relative(a[name], b[name]) <= (1e-5 if index in EARLY else 1e-4), (index, name, a[name], b[name])


@pytest.mark.parametrize("world,name", PLAIN)
def test_losses_and_gradients_are_those_of_a_single_process(runs, world, name):
    ours, theirs = metrics(runs.plain[world, name]), metrics(runs.plain[1, "single"])
    assert len(ours) == STEPS
    assert all(line["loss/bind"] > 0 and line["loss/perp"] > 0 and line["loss/val"] > 0 for line in theirs[SWITCH:])
    assert_close_runs(ours, theirs)
    assert ours[-1]["rows_digest"] == theirs[-1]["rows_digest"]
    reference = weights(runs.plain[1, "single"])
    assert (weights(runs.plain[world, name]) - reference).norm() <= 1e-4 * reference.norm()


@pytest.mark.parametrize("name", [*LAYOUTS[2], "zero2-offload", "zero3-offload"])
@pytest.mark.parametrize("variant", ["accumulate", "revival", "bare", "offload"])
def test_variants_are_those_of_a_single_process(runs, name, variant):
    """Accumulation (against none), dead slots revived in the live engine, no concepts at all, and offload."""
    layout, _, offload = name.partition("-")
    if bool(offload) != (variant == "offload"):
        return
    ours = metrics(runs.variants[2, layout, variant])
    theirs = metrics(runs.plain[1, "single"] if variant == "offload" else runs.variants[1, "single", variant])
    assert_close_runs(ours, theirs, TERMS if variant == "bare" else (*TERMS, "grad_norm", "dead"))


def test_revival_revived_something(runs):
    dead = [line["dead"] for line in metrics(runs.variants[1, "single", "revival"])]
    assert max(dead[:6]) > 0


@pytest.mark.parametrize("world,name", [(1, "single"), *((2, name) for name in LAYOUTS[2])])
def test_an_update_that_is_not_finite_changes_nothing_on_any_rank(runs, world, name):
    lines = metrics(runs.variants[world, name, "nonfinite"])
    assert all(not math.isfinite(line["grad_norm"]) for line in lines[:SWITCH])
    assert_close_runs(lines[SWITCH:], metrics(runs.variants[1, "single", "nonfinite"])[SWITCH:])
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines[SWITCH:])


@pytest.mark.parametrize("saved,name", RESUMED)
def test_a_checkpoint_resumes_under_any_strategy_and_world(runs, saved, name):
    ended, undisturbed = weights(runs.resumed[saved, name]), weights(runs.plain[saved])
    if saved == (2, name):
        assert torch.equal(ended, undisturbed)
    assert (ended - undisturbed).norm() <= 1e-4 * undisturbed.norm()
    lines = metrics(runs.resumed[saved, name])
    assert lines[0]["step"] == 11 and lines[-1]["rows_digest"] == metrics(runs.plain[saved])[-1]["rows_digest"]


def test_all_variants_ran(runs):
    assert {v for *_, v in runs.variants} == {*VARIANTS, "bare", "offload"}
