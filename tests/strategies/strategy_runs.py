"""Launching small curricula as users do, and reading what they wrote."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from accelerate.state import AcceleratorState

from trainer import losses
from trainer.private import reach
from trainer.stream import ShardWriter

ROOT = Path(__file__).resolve().parents[2]
WIDTH, CONCEPTS, ANSWERS, GLOBAL_BATCH = 16, 3, 4, 32
SWITCH, STEPS = 15, 30
TERMS = tuple(f"loss/{term.name}" for term in losses.TERMS)


def write_shards(folder: Path, *, concepts: int = CONCEPTS, width: int = WIDTH, rows: int = 640) -> Path:
    """Rows around one direction per concept; the labelled ones lie in the first half, so ranks get unequal numbers of them."""
    rng = np.random.default_rng(0)
    concept = rng.integers(0, max(concepts, 1), rows).astype(np.int32)
    directions = rng.standard_normal((max(concepts, 1), width))
    acts = (rng.standard_normal((rows, width)) * 0.7 + directions[concept]).astype(np.float32)
    answer = ((concept + rng.integers(0, 2, rows)) % ANSWERS).astype(np.int32)
    hidden = rng.random(rows) < np.where(np.arange(rows) < rows // 2, 0.2, 0.9)
    concept[hidden], answer[hidden | (rng.random(rows) < 0.2)] = -1, -1
    if not concepts:
        concept[:] = answer[:] = -1
    names = [f"concept-{i}" for i in range(concepts)]
    answers = [f"answer-{i}" for i in range(ANSWERS)] if concepts else []
    with ShardWriter(
        folder, "train", width=width, dtype="float32", concepts=names, answers=answers, rows_per_block=32
    ) as writer:
        writer.write(acts, concept, answer)
    return folder


def write_config(path: Path, shards: Path, *, align: bool = True) -> Path:
    """96 free slots in five banks, the last one smaller; 15 + 15 steps, every term on. Without `align` the first stage alone."""
    stages = [{"name": "pretrain", "steps": SWITCH}]
    if align:
        stages.append({"name": "align", "steps": STEPS - SWITCH})
    settings = {
        "run": {"dir": str(path.parent / "run"), "precision": "fp32", "log_every": 1, "seed": 3},
        "data": {"shards": str(shards), "global_batch": GLOBAL_BATCH, "lanes": 4, "threads": 0},
        "dictionary": {"free_slots": 96, "bank_slots": 20, "value_hidden": 8},
        "loss": {"sp": 0.05, "bind": 0.5, "perp": 0.05, "val": 0.2},
        "stages": stages,
        "optim": {"lr": 2e-3, "warmup": 2, "clip": 0.5},
        "revival": {"method": "none"},
        "checkpoint": {"every": 0},
        "tracking": {"uri": "off"},
        "kernel": "dense",
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@dataclass
class Result:
    """How a launched job ended."""

    code: int
    output: str


def launcher(name: str, *arguments: str) -> list[str]:
    """Command of this environment's accelerate, torchrun or python."""
    return [sys.executable if name == "python" else str(Path(sys.executable).parent / name), *arguments]


def launch(command: list[str], *, timeout: float = 300, env: dict[str, str] | None = None) -> Result:
    """Run a command, with more environment, and wait for it."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Result(done.returncode, done.stdout)


def torchrun(world: int, *arguments: str, timeout: float = 300, env: dict[str, str] | None = None) -> Result:
    """`torchrun` with `world` processes on a free port; plain Python for one."""
    command = launcher("torchrun", "--standalone", f"--nproc-per-node={world}") if world > 1 else launcher("python")
    return launch([*command, *arguments], timeout=timeout, env=env)


def run_jobs(home: Path, world: int, jobs: dict[Path, dict[str, list[str]]]) -> dict[str, Path]:
    """Run several jobs (configuration -> name -> overrides) in one process group of `world` ranks; returns name -> run folder."""
    home.mkdir(parents=True)
    listing = [
        {"config": str(config), "overrides": [f"run.dir={home / name}", *overrides]}
        for config, named in jobs.items()
        for name, overrides in named.items()
    ]
    path = home / "jobs.json"
    path.write_text(json.dumps(listing))
    worker = str(ROOT / "tests" / "strategies" / "strategy_worker.py")
    limit = 300 + 30 * len(listing)
    result = torchrun(world, worker, str(path), timeout=limit)
    (home / "output.txt").write_text(result.output)
    assert result.code == 0, result.output[-6000:]
    return {name: home / name for named in jobs.values() for name in named}


def forget_engine() -> None:
    """Let this process prepare a further engine: Accelerate keeps the DeepSpeed settings of the first one."""
    reach(AcceleratorState, "_reset_state", "accelerate", "tests/strategies/strategy_runs.py")()


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def relative(a: float, b: float) -> float:
    """|a - b| relative to b."""
    return abs(a - b) / max(abs(b), 1e-12)
