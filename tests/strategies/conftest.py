"""Launches on 1, 4 and 2 ranks whose runs the tests of this folder compare."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from strategy_runs import run_jobs, write_config, write_shards

# (world, layout) -> overrides.
_ENGINES = {n: [f"parallel.strategy={n}"] for n in ("ddp", "dictionary", "zero1", "zero2", "zero3")}
LAYOUTS: dict[tuple[int, str], list[str]] = {
    (1, "single"): [],
    **{(1, n): _ENGINES[n] for n in ("zero1", "zero2", "zero3")},
    **{(2, n): overrides for n, overrides in _ENGINES.items()},
    **{(4, n): overrides for n, overrides in _ENGINES.items()},
    (4, "mesh"): ["parallel.dictionary_ranks=2"],
}
SINGLE = (1, "single")
# Kinds of run beside the plain one; `bare` has no concepts and no answers.
VARIANTS = {
    "accumulate": ["optim.accumulate=4", "loss.perp=0"],
    # Gradients that are infinite in the whole first stage; losses that jump by 2% over the median of the last three.
    "overflow": [
        "stages.0.loss={rec: 3.4e+38, sp: 3.4e+38}",
        "data.global_batch=2",
        "data.lanes=2",
        "guard.stop_after=20",
    ],
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
}
FAST_PLAIN = [SINGLE, *((2, n) for n in _ENGINES), (4, "ddp"), (4, "zero3"), (4, "mesh")]
FAST_VARIANTS = [
    ((2, "zero2"), "accumulate"),
    ((2, "zero3"), "spike"),
    ((2, "dictionary"), "overflow"),
    ((2, "zero1"), "overflow"),
    ((2, "zero3"), "overflow"),
    ((2, "zero3"), "revival"),
    ((2, "zero3"), "bare"),
    ((2, "zero3"), "offload"),
]
FAST_RESUMED = [
    ((4, "ddp"), (4, "ddp")),  # sums over more than two ranks depend on their order
    ((2, "zero1"), (2, "zero1")),
    ((2, "zero3"), (2, "zero3")),
    (SINGLE, (2, "dictionary")),
    ((4, "mesh"), (2, "zero3")),
    ((2, "zero2"), (1, "zero3")),
]
ALL_VARIANTS = [
    (layout, variant)
    for layout in LAYOUTS
    for variant in VARIANTS
    if layout[0] == 2 and (variant != "offload" or layout[1].startswith("zero"))
]
ALL_RESUMED = [(saved, resumed) for saved in LAYOUTS for resumed in LAYOUTS]

Layout = tuple[int, str]


@dataclass
class Runs:
    """Folders of the runs: by layout, by (layout, variant), and by (saved under, resumed under)."""

    plain: dict[Layout, Path]
    variants: dict[tuple[Layout, str], Path]
    resumed: dict[tuple[Layout, Layout], Path]


def perform(
    folder: Path,
    plain: Iterable[Layout],
    variants: Iterable[tuple[Layout, str]],
    resumed: Iterable[tuple[Layout, Layout]],
) -> Runs:
    """Do all runs, with one launch per world (and a second one where runs are resumed that a later launch saved)."""
    config = write_config(folder / "config.yaml", write_shards(folder / "shards"))
    bare = write_config(folder / "bare.yaml", write_shards(folder / "bare-shards", concepts=0), align=False)
    done = Runs({}, {}, {})
    plain, variants, waiting = list(plain), list(variants), list(resumed)
    variants += [(SINGLE, v) for v in dict.fromkeys(v for _, v in variants) if v != "offload"]
    for round_ in ("first", "second"):
        for world in (1, 4, 2) if round_ == "first" else (1, 2, 4):
            home = folder / f"world-{world}-{round_}"
            jobs: dict[Path, dict[str, list[str]]] = {config: {}, bare: {}}
            kept: dict[str, tuple[dict, object]] = {}
            if round_ == "first":
                for layout in plain:
                    if layout[0] == world:
                        jobs[config][layout[1]] = [*LAYOUTS[layout], "checkpoint.every=10", "checkpoint.keep=9"]
                        kept[layout[1]] = (done.plain, layout)
                for layout, variant in variants:
                    if layout[0] == world:
                        name = f"{layout[1]}-{variant}"
                        jobs[bare if variant == "bare" else config][name] = [*LAYOUTS[layout], *VARIANTS[variant]]
                        kept[name] = (done.variants, (layout, variant))
            coming = {home / layout[1] for layout in plain if layout[0] == world}
            for saved, target in list(waiting):
                source = done.plain.get(saved, home / saved[1])
                if target[0] == world and (saved in done.plain or source in coming):
                    name = f"{saved[0]}-{saved[1]}-to-{target[1]}"
                    checkpoint = source / "checkpoints" / "step-00000010"
                    jobs[config][name] = [*LAYOUTS[target], f"checkpoint.resume={checkpoint}"]
                    kept[name] = (done.resumed, (saved, target))
                    waiting.remove((saved, target))
            folders = run_jobs(home, world, jobs) if kept else {}
            for name, path in folders.items():
                store, key = kept[name]
                store[key] = path
    return done


@pytest.fixture(scope="session")
def fast_runs(tmp_path_factory) -> Runs:
    return perform(tmp_path_factory.mktemp("strategies"), FAST_PLAIN, FAST_VARIANTS, FAST_RESUMED)


@pytest.fixture(scope="session")
def all_runs(tmp_path_factory) -> Runs:
    return perform(tmp_path_factory.mktemp("strategies"), LAYOUTS, ALL_VARIANTS, ALL_RESUMED)


@pytest.fixture
def runs(request) -> Mapping:
    """The runs of the fast suite, or all of them for a test marked slow."""
    return request.getfixturevalue("all_runs" if request.node.get_closest_marker("slow") else "fast_runs")
