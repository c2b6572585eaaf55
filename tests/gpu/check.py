"""`make gpu`: the tests of tests/gpu, then the benchmark, and the table for docs/performance.md. Needs a CUDA device.

It needs no network, and no package beyond torch, triton, transformers, accelerate, safetensors, numpy, pytest and what
the trainer imports; what is missing is skipped by name.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEERS = ("sae_lens", "sparsify")
# The setting of the bars: one H100, 100,006 slots, 8,192 rows.
SIZES = ["--rows", "8192", "--slots", "100000", "--width", "768", "--concepts", "6", "--l0", "64"]


def main() -> int:
    """Exit code: 0 where everything passed."""
    if importlib.util.find_spec("torch") is None:
        return refused("torch is not installed for this Python")
    import torch

    if not torch.cuda.is_available():
        return refused("torch finds no CUDA device here")
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "tests/gpu"]).returncode
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        peers = ["--peers", "--peers-python", sys.executable] if all(map(importlib.util.find_spec, PEERS)) else []
        missing = "" if peers else f"peers are not timed: {' or '.join(PEERS)} is not installed\n"
        sys.stdout.write(missing)
        command = [sys.executable, "-m", "tools.cli", "bench", "--json", str(file), "--compile", *SIZES, *peers]
        bench = subprocess.run(command).returncode
        if not bench:
            sys.stdout.write("\n" + table(json.loads(file.read_text())) + "\n")
    return tests or bench


def refused(reason: str) -> int:
    """Say in one line why nothing is checked."""
    sys.stderr.write(f"make gpu: {reason}\n")
    return 1


def table(found: dict[str, Any]) -> str:
    """Markdown of what the benchmark found, with the device's name."""
    shapes = found["shapes"]
    lines = [
        f"{found['device']}, torch {found['torch']}; B={shapes['rows']:,} D={shapes['width']} "
        f"S={shapes['slots'] + shapes['concepts']:,}, mean L0 {found['mean_l0']:.0f}; medians of {found['repeats']}",
        "",
        "| figure | ms |",
        "|---|---|",
        f"| encoder product / fused AdamW | {1e3 * found['encoder_product_s']:.2f} / {1e3 * found['adam_s']:.2f} |",
    ]
    lines += [f"| step, {name} | {1e3 * seconds:.2f} |" for name, seconds in found["step_s"].items()]
    lines += ["", "| ratio | measured |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value:.2f} |" for name, value in found["ratios"].items())])


if __name__ == "__main__":
    sys.exit(main())
