"""The rows of one measurement, and how the density is set."""

import torch
from torch import Tensor

from tools.timing.setting import Setting


def make_rows(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, D] of mean squared norm 1, concept [B, 1] and answer [B] int64; one row in ten has no label."""
    generator = torch.Generator().manual_seed(setting.seed)
    x = torch.randn(setting.rows, setting.width, generator=generator) / setting.width**0.5
    concept = torch.randint(0, max(setting.concepts, 1), (setting.rows,), generator=generator)
    concept[::10] = -1
    if setting.concepts == 0:
        concept.fill_(-1)
    answer = torch.where(concept >= 0, torch.randint(0, setting.answers, (setting.rows,), generator=generator), -1)
    return tuple(t.to(setting.device) for t in (x, concept[:, None], answer))  # type: ignore[return-value]


@torch.no_grad()
def bias_for(x: Tensor, encoder: Tensor, l0: float, slots: int) -> float:
    """The encoder bias, the same for all slots, at which a row has `l0` of `slots` slots active.

    `encoder` [n, D] is a sample of the slots.
    """
    pre = (x.float() @ encoder.float().T).flatten()
    active = max(1, round(pre.numel() * min(l0 / slots, 1.0)))
    return -float(pre.topk(active).values[-1])
