"""The points of a frontier: what is trained, what was measured, and which learning rate each trainer is shown at."""

import math
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

OURS = ("relu", "batch_topk")
PEERS = ("saelens_batchtopk", "saelens_jumprelu", "sparsify_topk")


@dataclass(frozen=True)
class Point:
    """One dictionary to train.

    trainer: one of OURS, which are gates of ours, or of PEERS. l0: mean active slots of a row to aim at.
    """

    trainer: str
    l0: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.trainer}-l0-{self.l0}-lr-{self.lr:g}-seed-{self.seed}"

    def overrides(self) -> list[str]:
        """What a configuration of ours says for it, or for the rows that a peer is given."""
        chosen = [f"optim.lr={self.lr!r}", f"run.seed={self.seed}"]
        if self.trainer == "relu":
            return [*chosen, "dictionary.gate=relu", f"dictionary.target_l0={self.l0}"]
        return [*chosen, "dictionary.gate=batch_topk", f"dictionary.k={self.l0}"]


def record(point: Point, measured: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a point."""
    return {"name": point.name, **{f"aimed_{k}" if k == "l0" else k: v for k, v in asdict(point).items()}, **measured}


def choose(found: list[dict[str, Any]]) -> None:
    """Set `chosen` of each record: whether its learning rate is the one at which its trainer has, at this L0, the least
    FVU on the validation rows (mean over seeds). Without validation rows all are."""
    by_rate: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        if one["validation"] is not None:
            fvu = one["validation"]["fvu"]
            rates = by_rate[one["trainer"], one["aimed_l0"]]
            rates[one["lr"]].append(math.inf if fvu is None else fvu)
    for one in found:
        means = {lr: statistics.fmean(fvu) for lr, fvu in by_rate[one["trainer"], one["aimed_l0"]].items()}
        one["chosen"] = not means or one["lr"] == min(means, key=lambda lr: means[lr])


def table(found: list[dict[str, Any]]) -> str:
    """The figures as a table of Markdown."""
    lines = [
        "| trainer | aimed L0 | lr | seed | L0 | held-out FVU | validation FVU | dead | CPU seconds per million rows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        validation = one["validation"]
        fvu = f"{_text(one['heldout']['fvu'])}{' *' if one['chosen'] and validation is not None else ''}"
        lines.append(
            f"| {one['trainer']} | {one['aimed_l0']} | {one['lr']:g} | {one['seed']} | {one['heldout']['l0']:.1f} "
            f"| {fvu} | {'-' if validation is None else _text(validation['fvu'])} | {one['dead']:.4f} "
            f"| {1e6 * one['cpu_seconds'] / one['rows']:.0f} |"
        )
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
