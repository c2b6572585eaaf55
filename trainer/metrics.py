"""Figures of the run: sums over the rows of the global batches of a log interval."""

import torch
from torch import Tensor

from trainer.losses import LossConfig
from trainer.objective import SUMS
from trainer.topology import Topology


class StepSums:
    """AlignObjective's sums of one step, over micro-batches and then over ranks."""

    def __init__(self, topology: Topology, micro_batches: int):
        self.topology = topology
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=topology.device)
        self._scale = torch.ones_like(self._sums)
        self._scale[SUMS.index("perp")] = 1.0 / micro_batches  # a mean over micro-batches

    def add(self, sums: Tensor) -> None:
        """Add what one forward returned."""
        self._sums += sums * self._scale

    def reduce(self, votes: list[float]) -> tuple[dict[str, float], list[float]]:
        """Sums of the global batch, and the votes of all ranks added up: the one reduction that every step makes besides gradients'."""
        mine = torch.tensor(votes, dtype=torch.float64).to(self._sums.device)
        total = self.topology.sum_over_world(torch.cat([self._sums, mine])).tolist()
        return dict(zip(SUMS, total, strict=False)), total[len(SUMS) :]


class Metrics:
    """Accumulates the sums of the steps of a log interval."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._total = dict.fromkeys(SUMS, 0.0)
        self.steps = 0

    def add(self, total: dict[str, float]) -> None:
        """Add the sums of one global batch."""
        for name, value in total.items():
            self._total[name] += value
        self.steps += 1

    def read(self, weights: LossConfig) -> dict[str, float]:
        """Figures of the global batches since the last read, and start anew.

        fvu is about the stored mean; l0 counts active slots per row; binding is the share of labelled rows whose largest concept
        logit is their concept's. For the losses see `loss_terms`.
        """
        total = self._total
        terms = loss_terms(total, self.steps)
        figures = {
            "loss": weighted(terms, weights),
            **{f"loss/{name}": value for name, value in terms.items()},
            "fvu": total["rec"] / max(total["variance"], 1e-30),
            "l0": total["active"] / max(total["rows"], 1.0),
            "binding": total["bound"] / max(total["labelled"], 1.0),
        }
        self._start()
        return figures


def loss_terms(total: dict[str, float], steps: int) -> dict[str, float]:
    """Means over rows (rec, sp), labelled rows (bind), answered rows (val) or steps (perp)."""
    rows, labelled, answered = (max(total[name], 1.0) for name in ("rows", "labelled", "answered"))
    return {
        "rec": total["rec"] / rows,
        "sp": total["sp"] / rows,
        "bind": total["bind"] / labelled,
        "perp": total["perp"] / max(steps, 1),
        "val": total["val"] / answered,
    }


def weighted(terms: dict[str, float], weights: LossConfig) -> float:
    """The loss."""
    return sum(getattr(weights, name) * value for name, value in terms.items())
