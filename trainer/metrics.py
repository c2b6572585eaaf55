"""Figures of the run: sums over the rows of the global batches of a log interval."""

import torch
from torch import Tensor

from trainer.late import to_device
from trainer.losses import COUNTS, TERMS, LossWeights, term_means, weighted
from trainer.sums import SUMS
from trainer.topology import Topology

_OF_THE_BATCH = [SUMS.index(term.name) for term in TERMS if term.mean_over == "steps"]


class StepSums:
    """AlignObjective's sums of one step, over micro-batches and then over ranks."""

    def __init__(self, topology: Topology, micro_batches: int):
        self.topology = topology
        self._sums: Tensor | None = None
        self._scale = None
        if micro_batches > 1:  # what is of the batch is a mean over micro-batches
            scale = [1.0 / micro_batches if i in _OF_THE_BATCH else 1.0 for i in range(len(SUMS))]
            self._scale = to_device(scale, torch.float64, topology.device)

    def add(self, sums: Tensor) -> None:
        """Add what one forward returned."""
        scaled = sums if self._scale is None else sums * self._scale
        self._sums = scaled if self._sums is None else self._sums + scaled

    def reduce(self, votes: list[float]) -> Tensor:
        """Sums of the global batch [len(SUMS)], and behind them, where there are several ranks, the votes of all added
        up: the one reduction that a step makes beside gradients'."""
        assert self._sums is not None, "a step has at least one micro-batch"
        if self.topology.world == 1:
            return self._sums
        mine = to_device(votes, torch.float64, self._sums.device)
        return self.topology.sum_over_world(torch.cat([self._sums, mine]))


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

    def read(self, weights: LossWeights, stage: str) -> dict[str, float]:
        """Figures of the global batches of a stage since the last read, and start anew.

        fvu is about the stored mean; l0 counts active slots per row; binding is the share of rows that list a concept
        whose largest concept logit is one of theirs. For the losses see `batch_means`. What does not count in the
        stage, or had no row to count, is absent.
        """
        total, means = self._total, batch_means(self._total, self.steps)
        there = total | {"steps": self.steps}
        measured = [term for term in TERMS if term.always or getattr(weights, term.name) > 0]
        counting = {term.name for term in measured if term.counts_in(stage) and there[term.mean_over] > 0}
        figures = {
            "loss": weighted(means, weights),
            **{f"loss/{name}": value for name, value in means.items() if name in counting},
            "fvu": total["rec"] / max(total["variance"], 1e-30),
            "l0": (total["active"] + total["concept_active"]) / max(total["rows"], 1.0),
        }
        if "bind" in counting and total["listing"]:
            figures["binding"] = total["bound"] / total["listing"]
        self._start()
        return figures


def batch_means(total: dict[str, float], steps: int = 1) -> dict[str, float]:
    """The mean of each term of the loss over what it runs over (losses.TERMS), from the sums of `steps` global
    batches."""
    counts = {name: max(total[name], 1.0) for name in COUNTS}
    return term_means(total, counts | {"steps": max(steps, 1)})
