"""Who may read what was written."""

import os
from pathlib import Path


def private_files(folder: Path) -> list[Path]:
    """Files of a folder that are not as readable as the umask has it."""
    mask = os.umask(0)
    os.umask(mask)
    wanted = 0o666 & ~mask
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mode & wanted != wanted]
