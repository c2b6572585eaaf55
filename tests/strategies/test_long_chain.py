"""A run of some hundred steps that is killed and goes on under another strategy, again and again, ends where one seed
among others ends.

    pytest -s -m slow tests/strategies/test_long_chain.py

prints the table of docs/scaling.md. Single steps are another matter: rounding grows, whatever the strategy.
"""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.faults.dying import train_apart
from tests.strategies.curriculum_runs import SINGLE, Layout
from tests.support.data import write_data
from tests.support.runs import metrics, train_here
from trainer.analysis.evaluation import evaluate_split
from trainer.analysis.results import rows_of
from trainer.checkpoint import load_dictionary

STEPS, KILLED_EVERY = 600, 90
CHAIN = [
    SINGLE,
    Layout("ddp", 2),
    Layout("zero3", 2),
    Layout("dictionary", 2),
    Layout("mesh", 4),
    Layout("zero2", 2),
    SINGLE,
]
SETTINGS = [
    "stages=[{name: pretrain, steps: 300}, {name: align, steps: 300}]",
    "checkpoint.every=30",
    "run.log_every=10",
    "revival.method=none",
    "data.window=8",
]
SEEDS = range(5)


def ended(folder: Path, data: Path) -> dict[str, float]:
    """FVU, L0, diagonal binding and slot accuracy of a run's dictionary on its rows."""
    dictionary, _ = load_dictionary(folder / "run")
    rows, sources = rows_of([str(data)], dictionary)
    found = evaluate_split(dictionary, rows, sources.manifest.concepts)
    names = {"fvu": ("reconstruction", "fvu"), "l0": ("reconstruction", "l0")}
    names |= {"binding": ("binding", "diagonal_accuracy"), "slots": ("binding", "slot_accuracy")}
    return {name: found[part][key] for name, (part, key) in names.items()}


@pytest.mark.slow
def test_a_chain_of_strategies_ends_within_the_spread_of_seeds(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", rows=2000)
    seeds = []
    for seed in SEEDS:
        assert train_here(tmp_path / f"seed-{seed}", data, *SETTINGS, f"run.seed={seed}") == 0
        seeds.append(ended(tmp_path / f"seed-{seed}", data))
    chain = tmp_path / "chain"
    for leg, layout in enumerate(CHAIN):
        last = layout is CHAIN[-1] and leg == len(CHAIN) - 1
        die_at = "" if last else f"step:{(leg + 1) * KILLED_EVERY}"
        codes = train_apart(chain, data, *SETTINGS, *layout.overrides, world=layout.world, die_at=die_at).codes
        assert codes == [0] if last else -signal.SIGKILL in codes, (str(layout), codes)
    alone, found = metrics(tmp_path / "seed-0"), metrics(chain)
    assert {step: line["rows_digest"] for step, line in found.items()} == {
        step: line["rows_digest"] for step, line in alone.items()
    }
    apart = {step: abs(line["loss"] / alone[step]["loss"] - 1) for step, line in found.items()}
    sys.stdout.write(
        f"\nlosses of the chain against one process: largest difference up to step 100 {worst(apart, 100):.1e}, "
        f"300 {worst(apart, 300):.1e}, {STEPS} {worst(apart, STEPS):.1e}\n"
        "| | chain | single, same seed | five seeds: least | most |\n|---|---|---|---|---|\n"
    )
    chained = ended(chain, data)
    for name, value in chained.items():
        low, high = min(run[name] for run in seeds), max(run[name] for run in seeds)
        sys.stdout.write(f"| {name} | {value:.4f} | {seeds[0][name]:.4f} | {low:.4f} | {high:.4f} |\n")
        spread = float(np.std([run[name] for run in seeds], ddof=1))
        assert abs(value - seeds[0][name]) <= max(2 * spread, 0.01 * abs(seeds[0][name])), name


def worst(apart: dict[int, float], until: int) -> float:
    """Largest relative difference of the steps up to one."""
    return max(value for step, value in apart.items() if step <= until)
