"""Files of a checkpoint: synced to disk, hashed, and what is left of those that were never finished."""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash


def digest(path: Path) -> str:
    """Hex xxh3_128 of a file's content: it finds damage, at the speed of memory. It is no defence against intent."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def seal(path: Path) -> dict[str, Any]:
    """Sync a written file to disk; its size and hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": digest(path)}


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean(root: Path) -> None:
    """Remove what killed or failed saves left.

    A checkpoint that stood aside is put back when its successor did not arrive.
    """
    with suppress(OSError):  # a folder that cannot be written is reported by the next save
        for aside in root.glob("step-*.old"):
            final = aside.with_suffix("")
            if (final / "COMPLETE").exists():
                shutil.rmtree(aside)
            else:
                shutil.rmtree(final, ignore_errors=True)
                aside.rename(final)
        for stale in root.glob("step-*.tmp"):
            shutil.rmtree(stale)
        # The first is what older versions left.
        for stale in (root / "latest.tmp", root / ".latest.tmp", root / ".best.tmp"):
            stale.unlink(missing_ok=True)
