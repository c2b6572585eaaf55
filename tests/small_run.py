"""A run of forty steps that takes a second: data, configuration, and what it left."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from trainer import train
from trainer.stream import ShardWriter

ROWS, WIDTH, CONCEPTS, BATCH, LANES = 496, 12, ["born", "studied", "works"], 48, 4
STEPS_PER_EPOCH = ROWS // BATCH
SWITCH, TOTAL = 2 * STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH
CONFIG: dict[str, Any] = {
    "run": {"precision": "fp32", "log_every": 1},
    "data": {"global_batch": BATCH, "lanes": LANES, "window": 2, "threads": 1},
    "dictionary": {"free_slots": 40, "bank_slots": 16, "value_hidden": 8},
    "stages": [{"name": "pretrain", "epochs": 2}, {"name": "align", "epochs": 2}],
    "optim": {"warmup": 3, "lr": 3e-3},
    "revival": {"every": 6, "dead_after": 3, "until": 1.0},
    "checkpoint": {"every": 7, "keep": 2},
    "kernel": "dense",
    "tracking": {"uri": "off"},
}


def write_data(
    folder: Path,
    *,
    width: int = WIDTH,
    concepts: list[str] = CONCEPTS,
    dtype: str = "float16",
    factors: dict[int, float] | None = None,
    rows: int = ROWS,
) -> Path:
    """Shards of `rows` rows in blocks of 20; row i is multiplied by factors[i]."""
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(30, width, generator=generator)
    codes = (torch.rand(rows, 30, generator=generator) < 0.1) * torch.rand(rows, 30, generator=generator)
    concept = torch.randint(-1, len(concepts), (rows,), generator=generator) if concepts else torch.full((rows,), -1)
    acts = codes @ parts
    if concepts:
        acts += torch.randn(len(concepts), width, generator=generator)[concept.clamp_min(0)]
    for row, factor in (factors or {}).items():
        acts[row] *= factor
    answer = torch.randint(-1, 5, (rows,), generator=generator)
    names = {"concepts": concepts, "answers": [f"a{i}" for i in range(5)], "model": "none", "hook_point": "layer-01"}
    # With factors: as if the normalisation had been measured on the other rows.
    usual = ([0.0] * width, 3.0) if factors else None
    with ShardWriter(
        folder, "train", width=width, dtype=dtype, rows_per_block=20, normalisation=usual, **names
    ) as writer:
        writer.write(acts, concept, answer)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_config(folder: Path) -> Path:
    """CONFIG as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def arguments(folder: Path, data: Path, *overrides: str) -> list[str]:
    """Command line of a run in folder/run."""
    return ["--config", str(write_config(folder)), f"data.shards={data}", f"run.dir={folder / 'run'}", *overrides]


def train_here(folder: Path, data: Path, *overrides: str) -> int:
    """Train in this process; the exit code."""
    return train.main(arguments(folder, data, *overrides))


def tensors(folder: Path, checkpoint: str = "") -> dict[str, Tensor]:
    """Every tensor of a checkpoint (default: latest) of folder/run."""
    root = folder / "run" / "checkpoints"
    root = root / (checkpoint or (root / "latest").read_text().strip())
    files = sorted(root.glob("*/*.safetensors"))
    assert files
    return {f"{file.parent.name}/{file.stem}/{name}": t for file in files for name, t in load_file(file).items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Lines of metrics.jsonl by step."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return {line["step"]: line for line in lines}


def digests(folder: Path) -> dict[int, str]:
    """rows_digest by step."""
    return {step: line["rows_digest"] for step, line in metrics(folder).items()}


def outcome(folder: Path) -> dict[str, Any]:
    """outcome.json."""
    return json.loads((folder / "run" / "outcome.json").read_text())


def quiet_environment(**more: str) -> dict[str, str]:
    """Environment of a started process: one thread, no launcher's variables."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**env, "OMP_NUM_THREADS": "1", **more}
