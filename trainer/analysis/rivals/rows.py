"""The training rows that methods are fitted on.

Shapes: N rows, D width, R concepts, M labels of a row at most.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainer.analysis.rows import RowSource
from trainer.errors import DataError
from trainer.labels import known, membership

BYTES = 1 << 28  # of activations that are held; of more rows, as many as fit, evenly chosen


@dataclass(frozen=True)
class TrainingRows:
    """Rows of which is known what concepts they have: acts [N, D] fp32, raw; member [N, R] bool."""

    acts: Tensor
    member: Tensor

    @cached_property
    def means(self) -> Tensor:
        """Mean row [R, D] of each concept."""
        return self._mean(self.member)

    @cached_property
    def others(self) -> Tensor:
        """Mean row [R, D] without each concept; the mean of all rows where every row has it."""
        everywhere = self.member.all(dim=0)
        return self._mean(~self.member | everywhere)

    @cached_property
    def mean(self) -> Tensor:
        """Mean row [D]."""
        return self.acts.double().mean(dim=0).float()

    @cached_property
    def without(self) -> Tensor:
        """Which rows have none of the concepts, bool [N]."""
        return ~self.member.any(dim=1)

    @cached_property
    def several(self) -> bool:
        """Whether a row has more than one concept."""
        return bool((self.member.sum(dim=1) > 1).any())

    @cached_property
    def centre(self) -> Tensor:
        """What a row [D] is without a concept: the mean of rows that have none, or of the concepts' means."""
        if bool(self.without.any()):
            return self.acts[self.without].double().mean(dim=0).float()
        return self.means.mean(dim=0)

    def _mean(self, of: Tensor) -> Tensor:
        share = of.double() / of.sum(dim=0).clamp_min(1)
        return (share.T @ self.acts.double()).float()


def training_rows(rows: RowSource, concepts: int) -> TrainingRows:
    """The rows with known labels, at most BYTES of them. DataError where a concept has none."""
    count, width = 0, 1
    for acts, concept in rows():
        count, width = count + int(known(concept).sum()), acts.shape[1]
    step = -(-count * width * 4 // BYTES) or 1
    kept: list[Tensor] = []
    members: list[Tensor] = []
    seen = 0
    for acts, concept in rows():
        usable = known(concept).nonzero().flatten()
        usable = usable[(torch.arange(len(usable), device=usable.device) + seen) % step == 0]
        seen += int(known(concept).sum())
        kept.append(acts[usable].float())
        members.append(membership(concept[usable], concepts))
    member = torch.cat(members) if members else torch.zeros(0, concepts, dtype=torch.bool)
    if missing := torch.nonzero(~member.any(dim=0)).flatten().tolist():
        raise DataError(f"no row for concept number(s) {missing}: nothing can be fitted to them")
    return TrainingRows(torch.cat(kept), member)
