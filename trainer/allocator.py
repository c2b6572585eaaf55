"""The C allocator, told to keep what a step frees for the next step.

By itself glibc takes every block above a limit straight from the system and gives it back when it is freed. The limit
starts at 128 KiB and moves with what the process frees, so a step's temporaries of a few MiB may cost thousands of page
faults each time, or none, as it happened to start.
Measured: docs/performance.md, "Pages".
"""

import ctypes
import os
import platform

# Parameters of mallopt(3), and the largest limit that glibc takes on 64-bit machines.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_BLOCK = 32 << 20
KEPT = 1 << 30  # free bytes at the end of the heap beyond which they go back to the system


def keep_freed_memory() -> bool:
    """Serve blocks up to 32 MiB from memory that was freed before. To be called when a process starts.

    Returns whether it took effect: not without glibc, nor where the environment sets the allocator itself.
    """
    decided = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if decided or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(M_TRIM_THRESHOLD, KEPT))
