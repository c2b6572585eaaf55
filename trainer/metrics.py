"""Figures of the run: sums stay on the device, with one reduction and one copy to the host per log interval."""

import torch
from torch import Tensor

from trainer.losses import LossConfig
from trainer.objective import SUMS
from trainer.topology import Topology


class Metrics:
    """Accumulates AlignObjective's sums over a log interval."""

    def __init__(self, topology: Topology):
        self.topology = topology
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=topology.device)
        self._perp_steps = 0

    def add(self, sums: Tensor, micro_batches: int = 1) -> None:
        """Add what one forward returned; a step has `micro_batches` of them, over which perp is averaged."""
        scale = torch.ones_like(sums)
        scale[SUMS.index("perp")] = 1.0 / micro_batches
        self._sums += sums * scale

    def close_step(self) -> None:
        """Count one step."""
        self._perp_steps += 1

    def read(self, weights: LossConfig) -> dict[str, float]:
        """Figures of the global batches since the last read, and start anew. Called on all ranks.

        Losses are means over rows (rec, sp), labelled rows (bind, val) or steps (perp); fvu is about the stored mean;
        l0 counts active slots per row; binding is the share of labelled rows whose largest concept logit is their concept's.
        """
        total = dict(zip(SUMS, self.topology.sum_over_world(self._sums).tolist(), strict=True))
        rows, labelled, answered = (max(total[name], 1.0) for name in ("rows", "labelled", "answered"))
        terms = {
            "rec": total["rec"] / rows,
            "sp": total["sp"] / rows,
            "bind": total["bind"] / labelled,
            "perp": total["perp"] / max(self._perp_steps, 1),
            "val": total["val"] / answered,
        }
        self._sums.zero_()
        self._perp_steps = 0
        return {
            "loss": sum(getattr(weights, name) * value for name, value in terms.items()),
            **{f"loss/{name}": value for name, value in terms.items()},
            "fvu": total["rec"] / max(total["variance"], 1e-30),
            "l0": total["active"] / rows,
            "binding": total["bound"] / labelled,
        }
