"""A run of forty steps that takes a second: how it is configured and started, and what it left."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.support.data import ROWS
from trainer import train

BATCH, LANES = 48, 4
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


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes, which may be nested."""
    deeper = {k: merged(settings[k], v) for k, v in changes.items() if isinstance(v, Mapping) and k in settings}
    return {**settings, **changes, **deeper}


def write_config(folder: Path, changes: Mapping[str, Any]) -> Path:
    """CONFIG with changes, as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(merged(CONFIG, changes)))
    return path


Data = Path | Mapping[str, Path]  # one folder, or folders of sources by name


def arguments(folder: Path, data: Data, *overrides: str, changes: Mapping[str, Any] | None = None) -> list[str]:
    """Command line of a run in folder/run on data: CONFIG with changes as a file, then overrides."""
    path = write_config(folder, changes or {})
    keys = {"data.shards": data} if isinstance(data, Path) else {f"data.sources.{n}.shards": d for n, d in data.items()}
    shards = [f"{key}={place}" for key, place in keys.items()]
    return ["--config", str(path), *shards, f"run.dir={folder / 'run'}", *overrides]


def train_rank(argv: list[str]) -> None:
    """What `python -m trainer.train` does; for tests.support.ranks."""
    train.exit_with(train.main(argv))


def train_here(folder: Path, data: Data, *overrides: str, changes: Mapping[str, Any] | None = None) -> int:
    """Train in this process; the exit code."""
    return train.main(arguments(folder, data, *overrides, changes=changes))


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
