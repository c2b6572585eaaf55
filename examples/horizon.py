"""Where relations live, over the layers of a model: python examples/horizon.py PICTURE.png RUN-layer-NN ...

Each RUN was trained, evaluated and swapped by examples/relations.sh. Left how well held-out facts are read, by slots
and by a logistic probe; right how many swaps of them succeed, with standard errors. The dotted line is the layer that
the swaps of validation facts choose. A run without swaps has no point on the right.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

picture, *runs = sys.argv[1:]
layers = {int(run.rpartition("-")[2]): Path(run) for run in runs}
read = {layer: json.loads((run / "evaluation.json").read_text())["heldout"] for layer, run in layers.items()}
swaps = {
    layer: json.loads((run / "swap.json").read_text()) for layer, run in layers.items() if (run / "swap.json").exists()
}

figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=130)
left, right = figure.subplots(1, 2)
for name, of in {
    "slots, silence counted as wrong": lambda found: found["binding"]["slot_accuracy"],
    "strongest slot": lambda found: found["binding"]["top1"],
    "logistic probe": lambda found: found["probe"]["top1"],
}.items():
    left.plot([*read], [of(found) for found in read.values()], marker="o", label=name)
for name in ("slots", "mean_difference"):
    parts = [swap[name] for swap in swaps.values()]
    errors = [part["standard_error"] or 0.0 for part in parts]
    right.errorbar([*swaps], [part["best_success"] for part in parts], errors, marker="o", capsize=3, label=name)
left.set(xlabel="block", ylabel="held-out facts read", ylim=(-0.02, 1.05))
right.set(xlabel="block", ylabel="swaps that succeed", ylim=(-0.02, 1.05), xlim=left.get_xlim())
if swaps:
    chosen = max(swaps, key=lambda layer: max(point["success"] for point in swaps[layer]["slots"]["alphas"]))
    right.axvline(chosen, color="grey", linestyle=":", linewidth=1)
for axes in (left, right):
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
figure.savefig(picture)
print(f"{len(read)} layers read, {len(swaps)} swapped: {picture}")
