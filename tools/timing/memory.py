"""Peak memory of one kind of step, in a process of its own: `python -m tools.timing.memory KIND SETTING_JSON`.

Prints the growth of resident memory (CPU: high-water mark; CUDA: allocator) from after the imports to the peak, in
bytes.
"""

import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tools.timing.baselines import DenseStep
from tools.timing.ours import OurStep
from tools.timing.setting import Setting
from trainer.allocator import keep_freed_memory
from trainer.errors import UserError

STEPS = 3
# kind -> (kernel or None for the autograd baseline, stage align, density of the setting rather than of initialisation)
KINDS = {
    "sparse/pretrain": ("sparse", False, True),
    "sparse/align": ("sparse", True, True),
    "triton/pretrain": ("triton", False, True),
    "triton/align": ("triton", True, True),
    "dense/pretrain": ("dense", False, False),
    "dense_bf16": (None, False, False),
    "dense_fp32": (None, False, False),
}


def peak_growth(kind: str, setting: Setting) -> int:
    """Measure in a fresh process. Raises UserError with the process's last line when it fails."""
    command = [sys.executable, "-m", "tools.timing.memory", kind, json.dumps(asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"memory of {kind} could not be measured: {lines[-1]}")
    return int(done.stdout.split()[-1])


def _status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes. (getrusage would count what the parent held when it forked.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _steps(kind: str, setting: Setting) -> None:
    kernel, align, sparse = KINDS[kind]
    if kernel is None:
        dense = DenseStep(setting)
        for _ in range(STEPS):
            dense.step(kind.removeprefix("dense_"))
    else:
        ours = OurStep(setting)
        ours.prepare(kernel, sparse)
        for _ in range(STEPS):
            ours.step(align)


def _main(kind: str, setting: Setting) -> int:
    keep_freed_memory()  # as training does
    # A tiny run first: what libraries load on first use is no part of a step.
    _steps(kind, replace(setting, rows=8, slots=64, bank_slots=32, concepts=min(setting.concepts, 4), l0=4.0))
    gc.collect()
    if setting.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _steps(kind, setting)
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    _steps(kind, setting)
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(_main(sys.argv[1], Setting(**json.loads(sys.argv[2]))))
