"""Active entries of a bank without its code, for whoever looks at them alone.

Shapes: B rows, D width, n slots of the bank, E active entries.
"""

from torch import Tensor

from trainer.dictionary import BankWeights
from trainer.kernels import native
from trainer.kernels.interface import StepContext


def active_entries(weights: BankWeights, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
    """Row [E] int64, slot [E] int64 and activation [E] fp32 of the entries above 0 of context.x [B, D], by slots and
    in a slot by rows.

    On a CPU the compiled operators find them where they can be built (trainer/kernels/sparse.py), else a dense product.
    """
    if context.x.device.type == "cpu" and native.load() is None:
        from trainer.kernels.sparse import find_entries

        found = find_entries(weights.W_enc, weights.b_enc, weights.threshold, context)
        return found.row.long(), found.slots(), found.z
    z = weights.encode(context.x).T
    slot, row = z.nonzero(as_tuple=True)
    return row, slot, z[slot, row]
