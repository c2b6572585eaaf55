"""Folders as other trainers write them, made here without them, and what a dictionary of each format computes,
spelled out plainly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, SLOTS = 12, 40


def weights(seed: int = 0, slots: int = SLOTS, width: int = WIDTH) -> dict[str, Tensor]:
    """W_enc [D, S], b_enc [S], W_dec [S, D], b_dec [D], threshold [S]."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "W_enc": random(width, slots) * 0.4,
        "b_enc": random(slots) * 0.2,
        "W_dec": random(slots, width) * 0.5,
        "b_dec": random(width),
        "threshold": random(slots).abs(),
    }


def saelens(
    folder: Path, architecture: str = "standard", *, tensors: dict[str, Tensor] | None = None, **config: Any
) -> Path:
    """A SAELens 6 folder."""
    kept = dict(weights() if tensors is None else tensors)
    if architecture not in ("jumprelu", "gated") and tensors is None:
        kept.pop("threshold")
    folder.mkdir(parents=True)
    save_file(kept, folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.0", "model_name": "none", "hook_name": "layer-01"}
    slots, width = kept["W_dec"].shape
    (folder / "cfg.json").write_text(
        json.dumps({"architecture": architecture, "d_in": width, "d_sae": slots, "metadata": metadata, **config})
    )
    return folder


def sparsify(folder: Path, **config: Any) -> Path:
    """A folder of eai-sparsify."""
    w = weights()
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 5, "d_in": WIDTH, **config}))
    return folder


def gemma_scope(folder: Path, compressed: bool = False) -> Path:
    """A folder of Gemma Scope."""
    folder.mkdir(parents=True)
    save: Callable[..., None] = np.savez_compressed if compressed else np.savez
    save(folder / "params.npz", **{name: t.numpy() for name, t in weights().items()})
    return folder


def computed(
    h: Tensor,
    *,
    threshold: Tensor | float = 0.0,
    bias_in: bool,
    factor: float = 1.0,
    tensors: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Code and reconstruction of raw rows, step by step as the other trainers take them."""
    w = weights() if tensors is None else tensors
    x = h * factor
    pre = (x - w["b_dec"] if bias_in else x) @ w["W_enc"] + w["b_enc"]
    code = torch.relu(pre) * (pre > threshold)
    return code, (code @ w["W_dec"] + w["b_dec"]) / factor


def rows(count: int = 100) -> Tensor:
    """Raw rows [count, D] with a mean that is not 0."""
    generator = torch.Generator().manual_seed(5)
    return 2.0 * torch.randn(count, WIDTH, generator=generator) + torch.linspace(-1, 1, WIDTH)
