"""The points of a frontier: what is trained, what was measured, and which learning rate each trainer is shown at."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OURS = ("relu", "batch_topk")
PEERS = ("saelens_batchtopk", "saelens_jumprelu", "sparsify_topk")
Record = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One dictionary to train.

    trainer: one of OURS, which are gates of ours, or of PEERS. l0: mean active slots of a row to aim at. share: of the
    configuration's steps and of its warm-up.
    """

    trainer: str
    l0: int
    lr: float
    seed: int
    share: float = 1.0

    @property
    def name(self) -> str:
        """Of its folder."""
        name = f"{self.trainer}-l0-{self.l0}-lr-{self.lr:g}-seed-{self.seed}"
        return name if self.share == 1.0 else f"{name}-share-{self.share:g}"

    def overrides(self) -> list[str]:
        """What a configuration of ours says for it, or for the rows that a peer is given."""
        chosen = [f"optim.lr={self.lr!r}", f"run.seed={self.seed}"]
        if self.trainer == "relu":
            return [*chosen, "dictionary.gate=relu", f"dictionary.target_l0={self.l0}"]
        return [*chosen, "dictionary.gate=batch_topk", f"dictionary.k={self.l0}"]


def record(point: Point, measured: dict[str, Any]) -> Record:
    """What is kept of a point."""
    return {"name": point.name, **{f"aimed_{k}" if k == "l0" else k: v for k, v in asdict(point).items()}, **measured}


def choose(found: list[Record]) -> None:
    """Set `chosen` of each record: whether its learning rate is the one at which its trainer has the least FVU on the
    validation rows at this L0 (mean over seeds). Without validation rows all are."""
    by_rate: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        if one["validation"] is not None:
            fvu = one["validation"]["fvu"]
            rates = by_rate[one["trainer"], one["aimed_l0"]]
            rates[one["lr"]].append(math.inf if fvu is None else fvu)
    for one in found:
        means = {lr: statistics.fmean(fvu) for lr, fvu in by_rate[one["trainer"], one["aimed_l0"]].items()}
        one["chosen"] = not means or one["lr"] == min(means, key=lambda lr: means[lr])


def grouped(found: Iterable[Record], *keys: str) -> dict[tuple, list[Record]]:
    """Records by the values of these keys, in the order in which they first appear."""
    groups: dict[tuple, list[Record]] = {}
    for one in found:
        groups.setdefault(tuple(one[key] for key in keys), []).append(one)
    return groups


def table(found: list[Record]) -> str:
    """The figures as a table of Markdown, seeds together: means, and of FVU the least and the largest as well."""
    lines = [
        "| trainer | aimed L0 | lr | share | seeds | L0 | held-out FVU | validation FVU | dead | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (trainer, aimed, lr, share), same in grouped(found, "trainer", "aimed_l0", "lr", "share").items():
        validated = [one["validation"] for one in same if one["validation"] is not None]
        star = " *" if same[0]["chosen"] and validated else ""
        dead, seconds = (statistics.fmean(one[key] for one in same) for key in ("dead", "cpu_seconds"))
        lines.append(
            f"| {trainer} | {aimed} | {lr:g} | {share:g} | {len(same)} "
            f"| {statistics.fmean(one['heldout']['l0'] for one in same):.1f} "
            f"| {_spread([one['heldout']['fvu'] for one in same])}{star} "
            f"| {_spread([one['fvu'] for one in validated])} | {dead:.4f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def compared(found: list[Record]) -> list[Record]:
    """Chosen points of all seeds, at equal L0: for each aimed L0, trainer and share the held-out FVU at that L0, on the
    line through the trainer's points (logarithms of both; a point alone gives its own FVU), mean, least and largest
    over seeds, and the mean CPU seconds of the point aimed there.

    Of a peer also `reached`: the least CPU seconds with which one of ours is as good, None where none is.
    """
    rows = []
    chosen = [one for one in found if one["chosen"] and one["heldout"]["fvu"]]
    for aimed in sorted({one["aimed_l0"] for one in chosen}):
        for (trainer, share), same in grouped(chosen, "trainer", "share").items():
            there = [one for one in same if one["aimed_l0"] == aimed]
            if not there:
                continue
            seeds = {one["seed"] for one in there}
            fvu = [_at(aimed, [one["heldout"] for one in same if one["seed"] == seed]) for seed in seeds]
            seconds = statistics.fmean(one["cpu_seconds"] for one in there)
            rows.append({"aimed_l0": aimed, "trainer": trainer, "share": share, "fvu": fvu, "cpu_seconds": seconds})
    for peer in rows:
        if peer["trainer"] in PEERS:
            good = [
                one["cpu_seconds"]
                for one in rows
                if one["trainer"] in OURS and one["aimed_l0"] == peer["aimed_l0"]
                and statistics.fmean(one["fvu"]) <= statistics.fmean(peer["fvu"])
            ]  # fmt: skip
            peer["reached"] = min(good, default=None)
    return rows


def comparison(rows: list[Record]) -> str:
    """`compared` as a table of Markdown."""
    lines = [
        "| L0 | trainer | share | held-out FVU at that L0 | over the best peer | CPU s | ours as good after |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peers = [
            statistics.fmean(one["fvu"]) for one in rows
            if one["trainer"] in PEERS and one["aimed_l0"] == row["aimed_l0"]
        ]  # fmt: skip
        ratio = f"{statistics.fmean(row['fvu']) / min(peers):.3f}" if peers else "-"
        reached, seconds = row.get("reached"), row["cpu_seconds"]
        after = "-" if reached is None else f"{reached:.0f} s, {reached / seconds:.2f} of its own"
        lines.append(
            f"| {row['aimed_l0']} | {row['trainer']} | {row['share']:g} | {_spread(row['fvu'])} | {ratio} "
            f"| {seconds:.0f} | {after} |"
        )
    return "\n".join(lines)


def _at(l0: float, measured: Sequence[Record]) -> float:
    """FVU at this L0 on the line through what was measured, straight in the logarithms of both."""
    points = sorted((math.log(one["l0"]), math.log(one["fvu"])) for one in measured)
    if len(points) == 1:
        return math.exp(points[0][1])
    where = math.log(l0)
    right = next((i for i, (x, _) in enumerate(points) if x >= where), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(right - 1, 0)], points[max(right, 1)]
    return math.exp(y0 + (y1 - y0) * (where - x0) / (x1 - x0)) if x1 > x0 else math.exp(y0)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.4f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.4f}-{max(known):.4f})"
