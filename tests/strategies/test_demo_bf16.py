"""The demo's dictionary, in bf16, under every strategy: held to the bars of configs/demo_bars.yaml that concern it.

    ALIGNSAE_DEMO_DATA=data/demo pytest -s -m slow tests/strategies/test_demo_bf16.py

prints the table of docs/scaling.md. The variable names the folder that `make demo` filled (default: data/demo of the
checkout). Where there is none, shorter runs train on made rows of the same form: persons x relations x templates, as
many of each.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import ROOT
from tests.support.ranks import run_ranks
from tests.support.runs import train_rank
from tools.cli import main
from tools.summary import compare, read_bars
from trainer.stream import ShardSpec, ShardWriter

SHORTER = ["stages.0.epochs=6", "stages.1.epochs=16"]  # 300 steps, not 1,400: made rows are learned faster
PERSONS, RELATIONS, WIDTH = 300, 6, 128
LAYOUTS = {
    "ddp": (2, ["parallel.strategy=ddp"]),
    "zero1": (2, ["parallel.strategy=zero1"]),
    "zero2": (2, ["parallel.strategy=zero2"]),
    "zero3": (2, ["parallel.strategy=zero3"]),
    "dictionary": (2, ["parallel.strategy=dictionary"]),
    "mesh": (4, ["parallel.strategy=dictionary", "parallel.dictionary_ranks=2"]),
}


def write_rows(folder: Path) -> Path:
    """train and heldout: one direction per person, relation and template; the held-out templates are others."""
    rng = np.random.default_rng(0)
    person, relation, template = (rng.standard_normal((n, WIDTH)) for n in (PERSONS, RELATIONS, 4))
    who, what = (grid.ravel() for grid in np.meshgrid(np.arange(PERSONS), np.arange(RELATIONS), indexing="ij"))
    for split, templates in (("train", (0, 1)), ("heldout", (2, 3))):
        acts = np.concatenate([person[who] + 2 * relation[what] + 0.1 * template[t] for t in templates])
        acts += 0.1 * rng.standard_normal(acts.shape)
        concept, answer = np.tile(what, 2).astype(np.int32), np.tile((who + what) % 50, 2).astype(np.int32)
        concepts, answers = [f"relation-{i}" for i in range(RELATIONS)], [f"answer-{i}" for i in range(50)]
        spec = ShardSpec(width=WIDTH, dtype="float16", concepts=concepts, answers=answers)
        with ShardWriter(folder / split, split, spec, rows_per_block=64) as writer:
            writer.write(acts.astype(np.float16), concept, answer)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, list[str]]:
    """Folder with train and heldout shards, and how long to train on them."""
    made = Path(os.environ.get("ALIGNSAE_DEMO_DATA", ROOT / "data" / "demo")).resolve() / "layer-01"
    if (made / "heldout" / "manifest.json").exists():
        return made, []
    assert "ALIGNSAE_DEMO_DATA" not in os.environ, f"{made} holds no heldout shards"
    return write_rows(tmp_path_factory.mktemp("rows")), SHORTER


def figures(evaluation: dict) -> dict:
    """Those of `alignsae summary` that are of a dictionary alone."""
    train, heldout = evaluation["train"], evaluation["heldout"]
    return {
        "binding_diagonal_accuracy": train["binding"]["diagonal_accuracy"],
        "concept_slots_alive": train["binding"]["slots_alive"],
        "slot_accuracy_heldout": heldout["binding"]["slot_accuracy"],
        "efffeat_concept": train["fragmentation"]["concept_slots"]["efffeat"],
        "fvu": max(part["reconstruction"]["fvu"] for part in (train, heldout)),
        "l0_share": max(part["reconstruction"]["l0_share"] for part in (train, heldout)),
        "concepts": len(evaluation["concepts"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_strategy_trains_the_demos_dictionary_to_the_demos_table(demo, tmp_path, name):
    (data, length), (world, overrides) = demo, LAYOUTS[name]
    began = time.monotonic()
    settings = [
        f"data.shards={data / 'train'}",
        f"run.dir={tmp_path / 'run'}",
        "run.precision=bf16",
        "tracking.uri=off",
    ]
    argv = ["--config", str(ROOT / "configs" / "demo.yaml"), *settings, *length, *overrides]
    run_ranks(world, train_rank, argv, timeout=1800)
    seconds = time.monotonic() - began
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--train", str(data / "train")]) == 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    found = figures(evaluation)
    table, passed = compare(
        found, [bar for bar in read_bars(ROOT / "configs" / "demo_bars.yaml") if bar["value"] in found]
    )
    l0 = max(evaluation[split]["reconstruction"]["l0"] for split in ("train", "heldout"))
    sys.stdout.write(
        f"\n| {name} | {world} | {found['fvu']:.4f} | {l0:.1f} | {found['binding_diagonal_accuracy']:.3f} "
        f"| {found['slot_accuracy_heldout']:.4f} | {seconds:.0f} s |\n"
    )
    assert passed, table
