"""Several banks of one rank as one: where the weights of each lie, for kernels that visit all of them in one launch.

A slot has a place: bank * n + its number in the bank, with n the slots of the largest bank. A smaller bank leaves the
places at its end empty. The table is int64 [FIELDS * banks]: for each field a number per bank.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.late import to_device

# Fields: addresses of the three weights, of the thresholds, of how much slots count and of which are dead; slots; and
# how far apart thresholds lie (0: one for all).
W_ENC, B_ENC, W_DEC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
THRESHOLD, COUNTED = tl.constexpr(3), tl.constexpr(4)
SLOTS, STRIDE, DEAD = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)


class Table(NamedTuple):
    """fields: the table. banks, slots (n) and width (D) of the banks; places = banks * n.

    kept: the tensors that the table points to.
    """

    fields: Tensor
    banks: int
    slots: int
    width: int
    kept: tuple[BankWeights, ...]

    @property
    def places(self) -> int:
        """banks * n."""
        return self.banks * self.slots

    @classmethod
    def of(cls, banks: Sequence[BankWeights]) -> "Table":
        """For banks whose weights are contiguous; they must stay where they are while the table is in use."""
        weights = tuple(_contiguous(bank) for bank in banks)
        rows = [
            [weight.data_ptr() for bank in weights for weight in (getattr(bank, name),)]
            for name in ("W_enc", "b_enc", "W_dec")
        ]
        rows.append([0 if bank.threshold is None else bank.threshold.data_ptr() for bank in weights])
        rows.append([0 if bank.perp_weight is None else bank.perp_weight.data_ptr() for bank in weights])
        rows.append([len(bank.b_enc) for bank in weights])
        rows.append([0 if bank.threshold is None else bank.threshold.stride(0) for bank in weights])
        rows.append([0 if bank.dead is None else bank.dead.data_ptr() for bank in weights])
        flat = tuple(number for row in rows for number in row)
        fields = _on_device(flat, weights[0].W_enc.device)
        return cls(fields, len(weights), max(rows[5]), weights[0].W_enc.shape[1], weights)

    def each(self, flat: Tensor) -> list[Tensor]:
        """Of a tensor [places, ...] the part of each bank [slots of the bank, ...]: views."""
        return [flat[i * self.slots : i * self.slots + len(bank.b_enc)] for i, bank in enumerate(self.kept)]


def _contiguous(bank: BankWeights) -> BankWeights:
    weight = bank.perp_weight
    whole = {name: getattr(bank, name).contiguous() for name in ("W_enc", "b_enc", "W_dec")}
    return bank._replace(**whole, perp_weight=None if weight is None else weight.contiguous())


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Weights stay where they are for a whole run, so the table of a step is nearly always an earlier one."""
    return to_device(numbers, torch.int64, device)
