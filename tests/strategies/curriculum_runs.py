"""Runs of one small curriculum under every layout: alone, with something special, and resumed under another layout."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tests.support.data import ROWS, write_data
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, train_rank
from trainer import losses

SWITCH, STEPS, SAVED = 15, 30, 10  # stage align begins after SWITCH steps; resumed runs go on from step SAVED
TERMS = tuple(f"loss/{term.name}" for term in losses.TERMS)
# Changes of the small run: five banks, the last one smaller, and every term on.
CURRICULUM: dict[str, Any] = {
    "run": {"seed": 3},
    "data": {"global_batch": 32, "threads": 0},
    "dictionary": {"free_slots": 96, "bank_slots": 20},
    "loss": {"sp": 0.05, "bind": 0.5, "perp": 0.05, "val": 0.2, "perp_on": "all"},
    "stages": [{"name": "pretrain", "steps": SWITCH}, {"name": "align", "steps": STEPS - SWITCH}],
    "optim": {"lr": 2e-3, "warmup": 2, "clip": 0.5},
    "revival": {"method": "none"},
    "checkpoint": {"every": 0},
}
PRETRAIN = {"stages": CURRICULUM["stages"][:1]}


@dataclass(frozen=True, order=True)
class Layout:
    """A strategy, or the mesh of dictionary and data ranks, on a number of ranks."""

    strategy: str
    world: int

    def __str__(self) -> str:
        return f"{self.strategy}x{self.world}"

    @property
    def overrides(self) -> list[str]:
        """What the command line says."""
        return ["parallel.dictionary_ranks=2"] if self.strategy == "mesh" else [f"parallel.strategy={self.strategy}"]


SINGLE = Layout("single", 1)
ZERO = ("zero1", "zero2", "zero3")
ON_TWO = [Layout(name, 2) for name in ("ddp", "dictionary", *ZERO)]
LAYOUTS = [
    SINGLE,
    *(Layout(name, 1) for name in ZERO),
    *ON_TWO,
    *(Layout(name, 4) for name in ("ddp", "dictionary", "mesh", *ZERO)),
]
# Kinds of run beside the plain one; `bare` has no concepts and no answers, `overflow` has rows twenty times as large,
# `labels` has rows of several concepts, of none, and unknown ones.
VARIANTS = {
    "accumulate": ["optim.accumulate=4", "loss.perp=0"],
    # Gradients that are infinite in the whole first stage; losses that jump by 2% over the median of the last three.
    "overflow": ["stages.0.loss={rec: 1.0e+36, sp: 1.0e+36}", "guard.stop_after=20"],
    "spike": ["guard.spike=1.02", "guard.window=3", "guard.stop_after=20"],
    "revival": [
        "revival.method=resample",
        "revival.every=6",
        "revival.dead_after=2",
        "revival.until=1",
        "optim.lr=0.05",
        "loss.sp=0.6",
    ],
    "bare": [],
    "offload": ["parallel.offload=true"],
    "labels": [
        "loss.binding=sigmoid",
        "loss.bind_balance=true",
        "loss.sp_concept=0.1",
        "loss.perp=0",
        "optim.accumulate=2",
    ],
    # A threshold that follows what all ranks have counted, in every bank; slots that begin along rows of all ranks.
    "batch_topk": [
        "dictionary.gate=batch_topk",
        "dictionary.begin=rows",
        "dictionary.initial_norm=0.3",
        "dictionary.k=4",
        "dictionary.k_fall=12",
        "checkpoint.every=10",
        "checkpoint.keep=9",
    ],
    # Thresholds that are trained, and slots that die and are pulled back.
    "jumprelu": [
        "dictionary.gate=jumprelu",
        "dictionary.target_l0=4",
        "dictionary.k_fall=8",
        "loss.sp=0.02",
        "loss.pull=0.05",
        "loss.bandwidth=0.2",
        "revival.dead_after=3",
        "checkpoint.every=10",
        "checkpoint.keep=9",
    ],
    "target_l0": ["dictionary.target_l0=4", "dictionary.k_fall=8"],
}
# Counted once over all ranks: three layouts stand for all.
FEW = {"target_l0": [Layout("ddp", 2), Layout("zero3", 2), Layout("mesh", 4)]}


class Runs:
    """Folders of runs, each done when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[str, Path] = {}
        self._data = {
            "": write_data(folder / "shards", dtype="float32"),
            "bare": write_data(folder / "bare-shards", dtype="float32", concepts=[]),
            "overflow": write_data(folder / "loud-shards", dtype="float32", factors=dict.fromkeys(range(ROWS), 20.0)),
            "labels": write_data(folder / "several-shards", dtype="float32", several=True),
        }

    def plain(self, layout: Layout) -> Path:
        """The curriculum from start to end, saved every ten steps."""
        return self._run(str(layout), layout, ["checkpoint.every=10", "checkpoint.keep=9"])

    def variant(self, layout: Layout, variant: str) -> Path:
        """The curriculum with the overrides of a variant."""
        return self._run(f"{layout}-{variant}", layout, VARIANTS[variant], variant)

    def resumed(self, saved: Layout, layout: Layout, variant: str = "") -> Path:
        """The end of the curriculum from what the plain run, or that of a variant, saved under another layout before
        the switch."""
        whole = self.variant(saved, variant) if variant else self.plain(saved)
        overrides = [*VARIANTS.get(variant, []), f"checkpoint.resume={whole / 'run/checkpoints' / f'step-{SAVED:08d}'}"]
        return self._run(f"{saved}-to-{layout}-{variant}", layout, overrides, variant)

    def _run(self, name: str, layout: Layout, overrides: list[str], variant: str = "") -> Path:
        if name not in self._done:
            folder, data = self._folder / name, self._data.get(variant, self._data[""])
            changes = CURRICULUM | PRETRAIN if variant == "bare" else CURRICULUM
            argv = arguments(folder, data, *layout.overrides, *overrides, changes=changes)
            run_ranks(layout.world, train_rank, argv)
            self._done[name] = folder
        return self._done[name]


def covering(layouts: Iterable[Layout]) -> list[tuple[Layout, Layout]]:
    """Pairs (saved under, resumed under) that stand for all of them.

    A checkpoint holds the units of a dictionary, whoever wrote it: what can go wrong between two layouts lies in their
    strategies or in their worlds. Every layout is resumed as it was saved. Every ordered pair of strategies is there
    (a strategy with itself on another world included), and the worlds are chosen so that every strategy meets every
    world on either side, and every world every world.
    """
    layouts = list(layouts)
    pairs = [(layout, layout) for layout in layouts]
    covered = {item for pair in pairs for item in meetings(*pair)}
    names = dict.fromkeys(layout.strategy for layout in layouts)
    for ours, theirs in product(names, names):
        candidates = [
            (saved, resumed)
            for saved, resumed in product(layouts, layouts)
            if (saved.strategy, resumed.strategy) == (ours, theirs) and saved != resumed
        ]
        if candidates:
            chosen = max(candidates, key=lambda pair: len(meetings(*pair) - covered))
            covered |= meetings(*chosen)
            pairs.append(chosen)
    return pairs


def meetings(saved: Layout, resumed: Layout) -> set[tuple[str, object, object]]:
    """What a pair of layouts tries out."""
    return {
        ("strategies", saved.strategy, resumed.strategy),
        ("worlds", saved.world, resumed.world),
        ("strategy to world", saved.strategy, resumed.world),
        ("world to strategy", saved.world, resumed.strategy),
    }
