"""Files of a checkpoint: written and synced, hashed, and read with suspicion."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import xxhash

from trainer.errors import DataError

# state.json and hashes.json hold names and numbers; far more than that is no checkpoint of ours.
MAX_JSON = 64 << 20


def digest(path: Path) -> str:
    """Hex xxh3_128 of a file's content: it finds damage, at the speed of memory. It is no defence against intent."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def seal(path: Path) -> dict[str, Any]:
    """Sync a written file to disk; its size and hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": digest(path)}


def write_json(path: Path, value: Any) -> None:
    """Write and sync."""
    with path.open("w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError, one line, for anything else."""
    try:
        with path.open("rb") as file:
            payload = file.read(MAX_JSON + 1)
        if len(payload) > MAX_JSON:
            raise DataError(f"{path} is larger than {MAX_JSON} bytes; it is not of a checkpoint")
        value = json.loads(payload, parse_constant=_no_constant)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(name)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
