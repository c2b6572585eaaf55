"""Three launches (1, 4 and 2 ranks) whose runs the tests of this folder compare."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from strategy_runs import run_jobs, write_config, write_shards

# What each world runs: name -> overrides.
LAYOUTS = {
    1: {"single": [], "zero3": ["parallel.strategy=zero3"]},
    2: {n: [f"parallel.strategy={n}"] for n in ("ddp", "dictionary", "zero1", "zero2", "zero3")},
    4: {n: [f"parallel.strategy={n}"] for n in ("ddp", "dictionary", "zero1", "zero2", "zero3")}
    | {"mesh": ["parallel.dictionary_ranks=2"]},
}
# Saved under (world, layout), resumed on two ranks under a layout.
RESUMED = [
    *(((2, name), name) for name in LAYOUTS[2]),
    ((1, "single"), "dictionary"),
    ((1, "zero3"), "ddp"),
    ((4, "zero3"), "ddp"),
    ((4, "dictionary"), "zero3"),
    ((4, "mesh"), "zero1"),
    ((4, "zero1"), "zero2"),
]
# Kinds of run beside the plain one: name -> overrides; each is run by `single` and, on two ranks, by every layout.
VARIANTS = {
    "accumulate": ["optim.accumulate=4", "loss.perp=0"],
    "nonfinite": ["stages.0.loss={rec: 3.0e+38}"],
    "revival": ["revival.method=resample", "revival.every=6", "revival.dead_after=2", "revival.until=1", "loss.sp=0.6"],
}


@dataclass
class Runs:
    """Folders of the runs: (world, layout), (world, layout, variant), and resumed ones (saved under, resumed under)."""

    plain: dict[tuple[int, str], Path]
    variants: dict[tuple[int, str, str], Path]
    resumed: dict[tuple[tuple[int, str], str], Path]


def resume_overrides(source: Path, step: int, layout: list[str]) -> list[str]:
    """Go on from a checkpoint of another run, in a folder of its own."""
    return [f"checkpoint.resume={source}/checkpoints/step-{step:08d}", *layout]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("strategies")
    config = write_config(folder / "config.yaml", write_shards(folder / "shards"))
    bare = write_config(folder / "bare.yaml", write_shards(folder / "bare-shards", concepts=0), align=False)
    done = Runs({}, {}, {})
    for world in (1, 4, 2):
        every = ["checkpoint.every=10", "checkpoint.keep=9"]
        jobs = {name: [*overrides, *every] for name, overrides in LAYOUTS[world].items()}
        layouts = {"single": []} if world == 1 else LAYOUTS[2] if world == 2 else {}
        for name, overrides in layouts.items():
            for variant, more in VARIANTS.items():
                jobs[f"{name}-{variant}"] = [*overrides, *more]
        if world == 2:
            for number, ((saved_world, saved), name) in enumerate(RESUMED):
                source = folder / f"world-{saved_world}" / saved
                jobs[f"resumed-{number}"] = resume_overrides(source, 10, LAYOUTS[2][name])
            jobs["zero2-offload"] = ["parallel.strategy=zero2", "parallel.offload=true"]
            jobs["zero3-offload"] = ["parallel.strategy=zero3", "parallel.offload=true"]
        bare_jobs = {f"{name}-bare": overrides for name, overrides in layouts.items()}
        folders = run_jobs(folder, world, {config: jobs, bare: bare_jobs})
        for name, path in folders.items():
            if name.startswith("resumed-"):
                done.resumed[RESUMED[int(name.removeprefix("resumed-"))]] = path
            elif "-" in name:
                layout, variant = name.split("-")
                done.variants[world, layout, variant] = path
            else:
                done.plain[world, name] = path
    return done
