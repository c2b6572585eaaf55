"""Locks that killed builds left behind.

torch.utils.cpp_extension, with which DeepSpeed builds its operators at first use, guards a build with a file `lock` in
the operator's folder, waits for as long as the file is there, and says nothing. A build that was killed leaves it.
"""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)

# A build elsewhere that shares the folder writes into it, or ends; a single compiler call takes less than this.
QUIET = 60.0  # seconds


def remove_left_locks(root: Path | None = None, quiet: float = QUIET) -> None:
    """Remove the locks in folders of operators that no build holds, before anything waits for them.

    A lock is left alone when a process of this host uses the folder, or when it is newer than this process: then it may
    be of another rank. One that is older is given `quiet` seconds since the last change in its folder, for a build on
    another host that shares it.
    """
    root = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        _remove(lock, quiet)


def _remove(lock: Path, quiet: float) -> None:
    waiting = False
    with suppress(FileNotFoundError):  # released meanwhile
        while not _used(lock.parent) and lock.stat().st_mtime <= _began():
            idle = time.time() - _last_change(lock)
            if idle >= quiet:
                lock.unlink()
                log.warning("removed %s, which a build that was killed left %.0f s ago", lock, idle)
                return
            if not waiting:
                log.warning("%s is held by no process here; waiting %.0f s for a build elsewhere", lock, quiet - idle)
                waiting = True
            time.sleep(min(1.0, quiet - idle))


def _last_change(lock: Path) -> float:
    """Time of the newest file in the lock's folder. Raises FileNotFoundError when the lock is gone."""
    times = [lock.stat().st_mtime]
    for path in lock.parent.iterdir():
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def _used(folder: Path) -> bool:
    """Whether a process of this host works in a folder or has one of its files open."""
    folder = folder.resolve()
    for process in Path("/proc").glob("[0-9]*"):
        links = [process / "cwd"]
        with suppress(OSError):  # ended, or not ours
            links += (process / "fd").iterdir()
        for link in links:
            with suppress(OSError):
                if folder in (target := link.readlink()).parents or target == folder:
                    return True
    return False


def _began() -> float:
    """When this process started."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, ValueError):
        return time.time()
