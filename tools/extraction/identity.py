"""What identifies an extraction, so that a finished split is kept on a rerun only if it would come out the same."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

# Arguments that change rows, labels or files. Batch size, device and processes do not.
ARGUMENTS = (
    *("concepts", "outside", "field", "context", "skip_first", "drop_special", "heldout"),
    *("precision", "dtype", "rows_per_block", "shard_mb", "unit_kb"),
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


def units_name(args: argparse.Namespace, made_from: dict[str, Any]) -> str:
    """Name of the folder of unfinished work, which only the same command may go on with: how sequences are batched
    changes the last bits of rows."""
    text = json.dumps([made_from, args.batch_size], sort_keys=True)
    return f".units-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def identity(args: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any]:
    """Model weights, input and arguments, as kept in the manifest."""
    return {
        "weights": weights_digest(model),
        "input": input_digest(args.prompts or args.texts),
        **{name: getattr(args, name) for name in ARGUMENTS},
    }
