"""What decides the rows of an extraction beside the model."""

from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.labels import NONE, UNKNOWN

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}
OUTSIDE = {"none": NONE, "unknown": UNKNOWN}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Input, and how it becomes rows; the arguments of `alignsae extract` of the same names, and `data.live`.

    texts, prompts: one of them is set. concepts: comma-separated names; None: as they appear. outside: one of OUTSIDE.
    context: tokens of a window. heldout: every N-th row without a split is held out; 0: none. unit_kb: KiB of text of a
    unit. batch_size: sequences of a forward pass. precision: one of COMPUTE. dtype: as stored.
    """

    texts: Path | None = None
    prompts: Path | None = None
    concepts: str | None = None
    outside: str = "none"
    field: str = "text"
    context: int = 512
    skip_first: int = 0
    drop_special: bool = False
    heldout: int = 0
    unit_kb: int = 256
    batch_size: int = 64
    precision: str = "fp32"
    dtype: str = "float16"

    @property
    def input(self) -> Path:
        """The file or folder that is read."""
        found = self.prompts or self.texts
        assert found is not None
        return found
