"""JSON lines of a run: one object per line, by step, that a resumed run takes up and a full disk does not stop."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Journal:
    """Appends objects with a `step` to a file.

    Args:
        path: the file.
        step: step that training starts from; lines of an earlier attempt beyond it are dropped.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self._failing = False
        kept = [line for line in _lines(path) if _step_of(line) <= step] if step else []
        if kept or path.exists():
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(path)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line. What the disk does not take is dropped whole, with one warning."""
        line = json.dumps(values).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                try:
                    written = file.write(line)
                except OSError:
                    file.truncate(end)
                    raise
                if written != len(line):
                    file.truncate(end)
                    raise OSError("the disk took a part of the line")
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written (%s); training goes on without", self.path, error.strerror or error)
            self._failing = True


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _step_of(line: bytes) -> float:
    """Step of a line; a line cut short by a crash counts as later than any."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
