"""The rows of a step, and the sums over them that add up over ranks and micro-batches.

Shapes: B rows of this rank, D width, R concepts, M labels of a row at most.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.kernels import StepContext
from trainer.labels import listing
from trainer.late import to_device
from trainer.losses import COUNTS, TERMS, LossForm
from trainer.topology import Topology

# Sums over rows that add up over ranks and micro-batches to the figures of the global batch: the terms of the loss,
# x^2, active entries of free slots, how many rows there are, rows that list a concept, active entries of concept slots,
# rows whose largest concept logit is one of their concepts', and visits of banks that had no room for their entries.
SUMS = (
    *(term.name for term in TERMS),
    "variance",
    "active",
    *COUNTS,
    "listing",
    "concept_active",
    "bound",
    "cramped",
)
ROWS, VARIANCE, ACTIVE, CONCEPT_ACTIVE, CRAMPED = (
    SUMS.index(name) for name in ("rows", "variance", "active", "concept_active", "cramped")
)
OWN = slice(ROWS, SUMS.index("listing") + 1)
# Where a term's mean finds its count among COUNTS and, behind them, 1 for the steps.
MEAN_OVER = [(*COUNTS, "steps").index(term.mean_over) for term in TERMS]
SPARSITY = [term.name for term in TERMS].index("sp")


@dataclass
class MicroBatch:
    """The rows that one forward sees, and how many the global batch has.

    acts [B, D] raw activations; concept [B, M] int64, see trainer.labels; answer [B] int64, -1 = none;
    counts [3] fp32: losses.COUNTS of the global batch (all ranks, all micro-batches);
    rows: rows of this micro-batch on all data ranks, a scalar fp32, None where it is the whole batch;
    part_rows [parts] fp32: the same of each of the slices that `split` makes, None where there is one.
    known: the counts as the host has them, None where it would have to ask other ranks. own: of these rows how many
        there are, count for the binding term, have an answer and list a concept, None where it would have to look.
    positives [R] fp32: rows of the global batch that list each concept, None where the loss does not balance.
    """

    acts: Tensor
    concept: Tensor
    answer: Tensor
    counts: Tensor
    rows: Tensor | None = None
    part_rows: Tensor | None = None
    positives: Tensor | None = None
    known: tuple[float, ...] | None = None
    own: tuple[float, ...] | None = None

    def split(self, parts: int) -> Iterator["MicroBatch"]:
        """The rows in `parts` slices, with the counts of the whole batch: means do not depend on the slicing."""
        if parts == 1 or self.part_rows is None:
            yield self
            return
        pieces = zip(*(torch.tensor_split(t, parts) for t in (self.acts, self.concept, self.answer)), strict=True)
        for (acts, concept, answer), rows in zip(pieces, self.part_rows, strict=True):
            yield MicroBatch(acts, concept, answer, self.counts, rows, positives=self.positives, known=self.known)


@torch.no_grad()
def share_of_sums(
    share: Tensor,
    batch: MicroBatch,
    form: LossForm,
    terms: Tensor,
    context: StepContext,
    active: Tensor,
    bound: Tensor | None,
    topology: Topology,
) -> Tensor:
    """This rank's share of SUMS [len(SUMS)], fp64.

    What dictionary ranks compute alike counts on the first of them only, and perp, a figure of the global batch, on one
    data rank.

    Args:
        share: a vector like the result, with `batch.own` at OWN where that is known and 0 elsewhere; it is written to.
        terms: [len(TERMS)], their sums. context: what the banks reported. active: [banks], their active entries.
        bound: [2], active entries of concept slots and rows bound right; None while they sleep.
    """
    share[: len(TERMS)].copy_(terms)
    torch.square(torch.linalg.vector_norm(context.row_norms), out=share[VARIANCE])
    torch.sum(active, 0, dtype=share.dtype, out=share[ACTIVE])
    if batch.own is None:
        counted, listed = form.counted(batch.concept), listing(batch.concept)
        rows = [torch.ones_like(listed), counted, batch.answer >= 0, listed]
        share[OWN].copy_(torch.stack(rows).sum(dim=1, dtype=torch.float64))
    if bound is not None:
        share[CONCEPT_ACTIVE : CONCEPT_ACTIVE + 2].copy_(bound)
    context.note_cramped(share[CRAMPED])
    if topology.world > 1:
        once = dict.fromkeys(SUMS, topology.dictionary_rank == 0)
        once |= {"sp": True, "pull": True, "active": True, "cramped": True, "perp": topology.data_rank == 0}
        share = share * to_device([float(once[name]) for name in SUMS], torch.float64, topology.device)
    return share
