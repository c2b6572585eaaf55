"""JSON lines of a run: one object per line, by step, that a resumed run takes up and a full disk does not stop."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import UserError

log = logging.getLogger(__name__)


class Journal:
    """Appends objects with a `step` to a file.

    Args:
        path: the file.
        step: step that training starts from; lines of an earlier attempt beyond it are dropped.
    Raises UserError when the file cannot be taken up; it then is as it was.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self._failing = False
        try:
            _drop_later(path, step)
        except OSError as error:
            raise UserError(
                f"{path} cannot be taken up at step {step} ({error.strerror}); free some space or take another run.dir"
            ) from error

    def write(self, values: Mapping[str, Any]) -> bool:
        """Append one line. What the disk does not take is dropped whole, with one warning, and False is returned."""
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
            return True
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written (%s); training goes on without", self.path, error.strerror or error)
            self._failing = True
            return False


def _drop_later(path: Path, step: int) -> None:
    """Drop damaged lines and those beyond `step`; all of them at step 0."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step] if step else []
    if kept == lines[: len(kept)]:  # the usual case, and one that a full disk allows
        if len(kept) < len(lines):
            os.truncate(path, sum(map(len, kept)))
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(b"".join(kept))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _step_of(line: bytes) -> float:
    """Step of a line; a line cut short by a crash counts as later than any."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
