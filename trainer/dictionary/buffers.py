"""What all free banks keep of one kind, as one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.dictionary.bank import SlotBank


class Joined:
    """One buffer of all free banks as one tensor, of which each bank holds its part: read and changed in one go."""

    def __init__(self, banks: Sequence[SlotBank], name: str):
        self._banks, self._name = banks, name
        self._whole = torch.empty(0)

    def whole(self) -> Tensor:
        """The buffers end to end."""
        parts = [bank.get_buffer(self._name) for bank in self._banks]
        if [part.data_ptr() for part in parts] != [part.data_ptr() for part in self.split(self._whole)]:
            self._whole = torch.cat(parts)  # at first, and when a module was moved
            for bank, part in zip(self._banks, self.split(self._whole), strict=True):
                setattr(bank, self._name, part)
        return self._whole

    def split(self, whole: Tensor) -> list[Tensor]:
        """A tensor like `whole()` in the parts of the banks: views."""
        if not len(whole):
            return []
        return list(whole.split([bank.get_buffer(self._name).numel() for bank in self._banks]))
