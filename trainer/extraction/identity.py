"""What identifies an extraction, so that a finished split is kept on a rerun only if it would come out the same."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from trainer.extraction.settings import Settings

# Settings that change rows or labels. Batch size, device and processes do not, but for the last bits.
IDENTIFYING = (
    *("concepts", "outside", "field", "context", "skip_first", "drop_special", "heldout"),
    *("precision", "dtype", "unit_kb"),
)


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 (hex) over a 64-bit hash of every parameter; of a parameter that --device-map left on disk, its shape."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        left_out = parameter.is_meta
        value = tuple(parameter.shape) if left_out else torch.hash_tensor(parameter.detach()).item()
        sha.update(f"{name} {value};".encode())
    return sha.hexdigest()


def input_digest(path: Path) -> str:
    """sha256 (hex) of a file; of names, sizes and times of the files of a folder."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        listing = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return hashlib.sha256(repr(listing).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(settings: Settings, model: torch.nn.Module) -> dict[str, Any]:
    """Model weights, input and settings, as kept in the manifest."""
    return {
        "weights": weights_digest(model),
        "input": input_digest(settings.input),
        **{name: getattr(settings, name) for name in IDENTIFYING},
    }
