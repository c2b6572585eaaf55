"""Names of labels in a file, and keys of samples."""

import re
from pathlib import Path

from trainer.errors import UserError
from trainer.files import parse_json, read_regular

KEY = r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,79}"


def read_names(path: Path) -> list[str]:
    """Label names in label order from a JSON list or a text file with one name per line; raises UserError."""
    try:
        text = read_regular(path).decode()
        names = parse_json(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as names ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: must hold one name per line, or a JSON list of names")
    if len(set(names)) != len(names):
        raise UserError(f"{path}: repeats a name")
    return names


def valid_key(key: str) -> bool:
    """Whether a sample key is safe to show, to store and to hand to webdataset (no dots, no separators)."""
    return re.fullmatch(KEY, key) is not None
