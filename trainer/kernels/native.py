"""The compiled CPU operators, `torch.ops.alignsae.*`: built on first use, then found in torch's extension cache.

A C++20 compiler and ninja are needed (DeepSpeed needs them as well). `load` says why when there is none.
"""

import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCES = ("encode.cpp", "sparse.cpp", "buffers.cpp", "adamw.cpp")
FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fopenmp", "-std=c++20", "-Wno-psabi"]


@functools.cache
def load() -> str | None:
    """Compile and register the operators, once per process; returns None, or one line saying why it cannot be done."""
    if not torch.cuda.is_available() and os.name != "posix":
        return f"no CPU operators for {platform.system()}"
    try:
        cpp_extension.load(
            name=f"alignsae_{_machine()}",
            sources=[str(Path(__file__).with_name(name)) for name in SOURCES],
            extra_cflags=FLAGS,
            extra_ldflags=["-fopenmp"],
            is_python_module=False,
        )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the CPU operators could not be compiled ({lines[0]}); a C++20 compiler and ninja are needed"
    return None


def _machine() -> str:
    """Short digest of what -march=native depends on, so that machines that share a home directory do not share a build."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        kept = sorted({line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        kept = [platform.processor(), platform.machine()]
    return hashlib.sha256("\n".join([torch.__version__, *kept]).encode()).hexdigest()[:12]
