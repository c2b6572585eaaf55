"""Held-out rows of two sources, evaluated under every strategy: the figures are those of a single process."""

from pathlib import Path
from typing import Any

import pytest

from tests.strategies.curriculum_runs import CURRICULUM, LAYOUTS, SINGLE, Layout
from tests.strategies.test_strategies import fast_and_slow, label
from tests.support.data import write_data
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, assert_same, metrics, tensors, train_rank

FAST = [Layout("ddp", 2), Layout("dictionary", 2), Layout("zero3", 2)]
SAME = fast_and_slow([Layout("zero3", 2)], [Layout("ddp", 2), Layout("mesh", 4)])
SHORT: dict[str, Any] = {
    **CURRICULUM,
    "loss": {**CURRICULUM["loss"], "binding": "sigmoid"},
    "stages": [
        {"name": "pretrain", "steps": 4, "mix": {"corpus": 1.0}},
        {"name": "align", "steps": 5, "mix": {"corpus": 0.5, "labelled": 0.5}},
    ],
    "run": {"seed": 3, "evaluate_every": 2},
    "checkpoint": {"every": 0, "best": "heldout/corpus/fvu"},
}


class Runs:
    """Folders of short runs, each done when it is first asked for. 77 rows of one source are held out, so that ranks
    have unequal numbers of them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._sources = {
            "corpus": write_data(folder / "corpus", dtype="float32", rows=360, concepts=["studied"]),
            "labelled": write_data(folder / "labelled", dtype="float32", rows=90, several=True),
        }
        held = {
            "corpus": write_data(folder / "held-corpus", dtype="float32", rows=200, concepts=[]),
            "labelled": write_data(folder / "held-labelled", dtype="float32", rows=77, several=True),
        }
        self._held = [f"data.sources.{name}.heldout={place}" for name, place in held.items()]

    def of(self, layout: Layout, *overrides: str) -> Path:
        """Of a layout, with more settings."""
        folder = self._folder / "-".join([str(layout), *overrides]).replace("/", "_")
        if not folder.exists():
            argv = arguments(folder, self._sources, *layout.overrides, *self._held, *overrides, changes=SHORT)
            run_ranks(layout.world, train_rank, argv)
        return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("heldout"))


@pytest.mark.parametrize("layout", fast_and_slow(FAST, (x for x in LAYOUTS if x != SINGLE)), ids=label)
def test_figures_are_those_of_a_single_process(short: Runs, layout: Layout) -> None:
    ours, theirs = metrics(short.of(layout)), metrics(short.of(SINGLE))
    for step in (2, 4, 6, 8, 9):
        names = {name for name in theirs[step] if name.startswith("heldout/")}
        assert len(names) == (6 if step <= 4 else 13) and names <= ours[step].keys()
        assert 0 < theirs[step]["heldout/corpus/fvu"] != theirs[step]["heldout/labelled/fvu"] > 0
        for name in names:
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-5, abs=1e-9), (step, name)
    assert best(short.of(layout)) == best(short.of(SINGLE))


def best(folder: Path) -> str:
    return (folder / "run" / "checkpoints" / "best").read_text()


@pytest.mark.parametrize("layout", SAME, ids=label)
def test_evaluations_change_nothing(short: Runs, layout: Layout) -> None:
    without = short.of(layout, "run.evaluate_every=0", "checkpoint.best=null")
    assert_same(tensors(short.of(layout)), tensors(without))
