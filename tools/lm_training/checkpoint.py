"""Checkpoints of a language model in training: safetensors and JSON, written under a temporary name and renamed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import UserError
from trainer.files import allow_as_umask

NAME = "checkpoint"


def _parameter_names(model: Any) -> dict[Any, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer, step: int, settings: dict[str, Any]) -> None:
    """Replace `folder`/checkpoint by the state after `step` steps. OSError or SafetensorError where writing fails."""
    temporary, final = folder / f"{NAME}.tmp", folder / NAME
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for parameter, name in _parameter_names(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key}.{name}"] = value.detach().contiguous()
    save_file(weights, temporary / "model.safetensors")
    save_file(state, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, "settings": settings}, indent=2), encoding="utf-8")
    allow_as_umask(temporary)
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    # A crash between the two renames loses the checkpoint, not the run: training then starts again at step 0.
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def load(folder: Path, model: Any, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> int:
    """Restore model and optimizer in place and return the number of steps done; 0 when there is no checkpoint.

    UserError when the checkpoint is damaged or was made with other settings.
    """
    path = folder / NAME
    if not path.exists():
        return 0
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights, moments = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
        step, made_with = int(state["step"]), state["settings"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {folder} to start again") from error
    different = [name for name in settings if settings[name] != made_with.get(name)]
    if different:
        raise UserError(
            f"{path} was made with another {', '.join(different)}: use the same arguments or delete {folder}"
        )
    with torch.no_grad():
        for parameter, name in _parameter_names(model).items():
            parameter.copy_(weights[name])
            keys = [key for key in moments if key.endswith(f".{name}")]
            optimizer.state[parameter] = {key.removesuffix(f".{name}"): moments[key] for key in keys}
    return step
