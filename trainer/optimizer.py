"""The optimizer of a run: its configuration and how it is built."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import UserError


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    The rate rises linearly over the first `warmup` steps of each stage and falls linearly to 0 over the last `decay`
    share of the run.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest global gradient norm; 0 = off
    warmup: int = 100  # steps at the start of each stage
    decay: float = 0.2  # last share of the run
    accumulate: int = 1  # backward passes per step

    def validate(self) -> None:
        """Raise UserError for a number that cannot be."""
        for name, low in (("lr", 0.0), ("weight_decay", 0.0), ("clip", 0.0), ("warmup", 0), ("accumulate", 1)):
            if not getattr(self, name) >= low:
                raise UserError(f"optim.{name}={getattr(self, name)} must be at least {low}")
        if not self.eps > 0:
            raise UserError(f"optim.eps={self.eps} must be above 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"optim.betas={list(self.betas)} must be two numbers in [0, 1)")
        if not 0 <= self.decay <= 1:
            raise UserError(f"optim.decay={self.decay} must be between 0 and 1")


def build_optimizer(params: Iterable[Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over `params` (fp32 masters) in one fused pass; `config.lr` is its rate until a schedule sets another."""
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        list(params), lr=config.lr, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
