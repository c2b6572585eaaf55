"""A figure's spread over runs that differ in their seed: python examples/over_seeds.py RUN RUN ...

Each RUN was evaluated and swapped (`alignsae evaluate`, `alignsae swap`) on the same prompts; methods that not all have
are left out. Printed are the mean over runs of each figure and, in brackets, its standard deviation over them; `slots
over` is the difference in success, with the mean of its standard errors over subjects behind it.
"""

import json
import statistics
import sys
from pathlib import Path

from tools.swapping.table import FORMS, methods_of


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation, or a dash where a run has no such figure."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    deviation = f" ({statistics.stdev(known):.3f})" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3f}{deviation}"


runs = [Path(run) for run in sys.argv[1:]]
heldout = [json.loads((run / "evaluation.json").read_text())["heldout"] for run in runs]
swaps = [methods_of(json.loads((run / "swap.json").read_text())) for run in runs]
print(f"{len(runs)} runs: mean (standard deviation)")
for name, of in {
    "FVU": lambda found: found["reconstruction"]["fvu"],
    "L0": lambda found: found["reconstruction"]["l0"],
    "slot accuracy": lambda found: found["binding"]["slot_accuracy"],
    "probe": lambda found: found["probe"]["top1"],
    "EffFeat, all slots": lambda found: found["fragmentation"]["all"]["efffeat"],
}.items():
    print(f"{name:20s} {spread([of(found) for found in heldout])}")
columns = ("success", "isolation", "joint")
print(f"{'method':16s} {'edit':12s} alphas{'':8s} " + " ".join(f"{column:14s}" for column in columns) + " slots over")
for name in (name for name in swaps[0] if all(name in swap for swap in swaps)):
    for form, edit in FORMS.items():
        alphas = ",".join(f"{swap[name]['best_alpha']:g}" for swap in swaps)
        cells = [spread([swap[name]["forms"][form][column] for swap in swaps]) for column in columns]
        over = [swap[name]["slots_over"][form]["success"] for swap in swaps] if name != "slots" else []
        lead = spread([one["difference"] for one in over]) if over else ""
        error = f", {statistics.fmean(one['standard_error'] or 0.0 for one in over):.3f}" if over else ""
        print(f"{name:16s} {edit:12s} {alphas:14s} " + " ".join(f"{cell:14s}" for cell in cells) + f" {lead}{error}")
