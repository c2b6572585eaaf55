"""The compiled CPU operators, `torch.ops.alignsae.*`: built on first use, then found in torch's extension cache.

A C++20 compiler and ninja are needed (DeepSpeed needs them as well). `load` says why when there is none.
"""

import fcntl
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCES = [
    Path(__file__).with_name(name)
    for name in ("encode.cpp", "sparse.cpp", "correlation.cpp", "buffers.cpp", "adamw.cpp")
]
HEADERS = [Path(__file__).with_name(name) for name in ("lanes.h", "product.h", "entries.h")]
FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fopenmp", "-std=c++20", "-Wno-psabi"]


@functools.cache
def load() -> str | None:
    """Register the operators, compiling them where nobody has; once per process.

    Returns None, or one line saying why it cannot be done.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library = root / f"alignsae-{_digest()}.so"
    try:
        if not library.exists():
            _compile(library)
        torch.ops.load_library(library)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()] or [type(error).__name__]
        return (
            f"the CPU operators could not be compiled ({lines[0].strip()[:200]}); a C++20 compiler and ninja are needed"
        )
    return None


def _compile(library: Path) -> None:
    """Build in a folder of our own and move the result into place.

    torch's own lock is a file that a killed process leaves behind, for all others to wait on; the system drops this one
    with its holder.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:  # noqa: PTH123 - flock wants the file object
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            cpp_extension.load(
                name=library.stem.replace("-", "_"),
                sources=[str(source) for source in SOURCES],
                extra_cflags=FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
                is_standalone=False,
            )
            (Path(folder) / f"{library.stem.replace('-', '_')}.so").replace(library)


def _digest() -> str:
    """Of the sources, torch, and what -march=native depends on, since machines may share a home directory."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        kept = sorted({line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        kept = [platform.processor(), platform.machine()]
    parts = [torch.__version__, *FLAGS, *kept, *(path.read_text() for path in SOURCES + HEADERS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
