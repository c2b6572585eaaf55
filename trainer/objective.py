"""AlignObjective: the fused top-level loss module.

Its forward takes rows and returns the loss, bank by bank, never holding a whole code.

Shapes: B rows of this rank, G of the global batch, D width, R concepts, M labels of a row at most, n slots of a bank, A
answers. Formulas:
docs/design.md, "The numbers".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.autograd import Attach, SumForward
from trainer.binding import summed_binding
from trainer.dictionary import BankWeights, ConceptDictionary, SlotBank, apply_gate, bank_unit
from trainer.following import followed_dependence, perp_weight
from trainer.kernels import BankKernel, KernelChoice, Orthogonality, RowPairs, StepContext
from trainer.labels import listing
from trainer.losses import (
    COUNTS,
    TERMS,
    LossForm,
    LossWeights,
    term_means,
    weighted,
)
from trainer.topology import Topology

# With fewer concepts their products cost nothing in fp32 (at 64, under 1% of a step), so that there is nothing to round
# for.
BF16_CONCEPTS = 64


@dataclass
class MicroBatch:
    """The rows that one forward sees, and how many the global batch has.

    acts [B, D] raw activations; concept [B, M] int64, see trainer.labels; answer [B] int64, -1 = none;
    counts [3] fp32: losses.COUNTS of the global batch (all ranks, all micro-batches);
    rows: rows of this micro-batch on all data ranks, a scalar fp32, None where it is the whole batch;
    part_rows [parts] fp32: the same of each of the slices that `split` makes, None where there is one.
    positives [R] fp32: rows of the global batch that list each concept, None where the loss does not balance.
    """

    acts: Tensor
    concept: Tensor
    answer: Tensor
    counts: Tensor
    rows: Tensor | None = None
    part_rows: Tensor | None = None
    positives: Tensor | None = None

    def split(self, parts: int) -> Iterator["MicroBatch"]:
        """The rows in `parts` slices, with the counts of the whole batch: means do not depend on the slicing."""
        if parts == 1 or self.part_rows is None:
            yield self
            return
        pieces = zip(*(torch.tensor_split(t, parts) for t in (self.acts, self.concept, self.answer)), strict=True)
        for (acts, concept, answer), rows in zip(pieces, self.part_rows, strict=True):
            yield MicroBatch(acts, concept, answer, self.counts, rows, positives=self.positives)


# Sums over rows that add up over ranks and micro-batches to the figures of the global batch: how many there are, the
# terms of the loss, x^2, active entries of free and of concept slots, rows that list a concept, and those of them whose
# largest concept logit is one of their concepts'.
SUMS = (*COUNTS, *(term.name for term in TERMS), "variance", "active", "concept_active", "listing", "bound")


class AlignObjective(nn.Module):
    """The dictionary with its training loss.

    Args:
        dictionary: weights; under dictionary parallelism it holds only this rank's free banks.
        topology: where this rank stands in the mesh.
        form: of the terms, None: the default one (weights come with each call, since they follow the curriculum).
        kernel: auto, or the name of one kernel (trainer/kernels).
        precision: fp32, or bf16 for bf16 products on fp32 masters.
        kernels: kernel of each bank held here to go on with; None: those of a new dictionary.
    """

    def __init__(
        self,
        dictionary: ConceptDictionary,
        topology: Topology,
        *,
        form: LossForm | None = None,
        kernel: str = "auto",
        precision: str = "fp32",
        kernels: list[str] | None = None,
    ):
        super().__init__()
        self.dictionary = dictionary
        self.form = form or LossForm()
        self.topology = topology
        sizes = [bank.slots for bank in dictionary.free_banks()]
        self.choice = KernelChoice(kernel, sizes, topology.device, kernels)
        self.product_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # Of the forward passes since the last update: squares by bank, rows and concepts, see followed_dependence.
        self._correlations: list[tuple[list[Tensor], Tensor, Tensor]] = []
        many = len(dictionary.concept_names) >= BF16_CONCEPTS
        self.concept_dtype = self.product_dtype if many else torch.float32

    def forward(self, batch: MicroBatch, weights: LossWeights, align: bool, step: int) -> tuple[Tensor, Tensor]:
        """Loss of one (micro-)batch.

        Args:
            batch: see MicroBatch.
            weights: the weight of each term at this step.
            align: whether the concept slots are awake (stage align).
            step: global step, noted by slots that fire.

        Returns:
            loss, a scalar for backward, scaled so that its gradient averaged over data ranks is that of the global
            loss; and sums [len(SUMS)] fp64, this rank's share of SUMS, without gradient.
        """
        topology = self.topology
        x = self.dictionary.normalise(batch.acts)
        x_bf16 = x.to(self.product_dtype) if self.product_dtype == torch.bfloat16 else None
        # Asleep, the concept path runs on no rows: every parameter still gets a (zero) gradient, which every engine
        # needs.
        awake = len(x) if align else 0
        concept, answer = batch.concept[:awake], batch.answer[:awake]
        operand = x if x_bf16 is None or self.concept_dtype == torch.float32 else x_bf16
        pre, z_concept, x_hat_concept, sp_concept = self.dictionary.concepts(self._concept_path, operand[:awake])

        use_perp = align and weights.perp > 0 and z_concept.shape[1] > 0
        rows = batch.counts[0] if batch.rows is None else batch.rows
        orthogonality = self._orthogonality(z_concept.detach(), rows.clamp_min(1)) if use_perp else None
        context = StepContext(x, x_bf16, orthogonality)
        x_hat, sp, perp = self._visit_banks(context)
        self._note_activity(context, step)
        x_hat, concept_gradient = self._meet_dictionary(x_hat, orthogonality)
        if align:
            x_hat = x_hat + x_hat_concept
        x_hat = self.dictionary.output(x_hat)

        logits = pre if self.form.bind_on == "pre" else z_concept
        sums = {
            "rec": (x - x_hat).square().sum(),
            "sp": sp,
            "bind": summed_binding(logits, concept, self.form, batch.counts[1], batch.positives),
            "perp": perp,
            "val": self._value(z_concept, answer),
            "sp_concept": sp_concept,
        }
        figures = {
            "rows": len(x),
            "labelled": self.form.counted(batch.concept).sum(),
            "answered": (batch.answer >= 0).sum(),
            "variance": x.square().sum(),
            "active": sum(stats.active for stats in context.stats),
            "concept_active": (z_concept > 0).sum(),
            "listing": listing(batch.concept).sum(),
            "bound": (logits.argmax(dim=1, keepdim=True) == concept).sum() if logits.shape[1] else 0,
        }
        share = self._share({**sums, **figures})

        if concept_gradient is not None:
            sums["perp"] = perp + Attach.apply(z_concept, concept_gradient)
        counts = dict(zip(COUNTS, batch.counts.clamp_min(1).unbind(), strict=True), steps=x.new_ones(()))
        # Engines average gradients over data ranks, while these sums are shares of the global batch.
        loss = topology.data_world * weighted(term_means(sums, counts), weights)
        return loss if align else loss + 0.0 * x_hat_concept.sum(), share

    @staticmethod
    def _concept_path(weights: BankWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pre-activations [B, R], code [B, R], share of the reconstruction [B, D] and sum of sp_concept of the concept
        slots, all fp32."""
        pre = weights.pre_activations(x)
        z = apply_gate(pre, weights.threshold)
        return pre, z, weights.decode(z.to(x.dtype)), (z @ weights.decoder().norm(dim=1)).sum()

    def _orthogonality(self, z: Tensor, total: Tensor) -> Orthogonality:
        """What banks need of the concept code [B, R]."""
        found = Orthogonality.standardise(z, total, self.topology.sum_over_data)
        if self.topology.data_world == 1:
            slots = sum(bank.slots for bank in self.dictionary.free_banks())
            found.pairs = RowPairs(found.concept, total, slots, self.product_dtype)
        return found

    def _visit_banks(self, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """The chain of free banks: reconstruction [B, D], and the sums of sp and perp over banks."""
        x_hat = torch.zeros_like(context.x)
        sp = perp = x_hat.new_zeros(())
        for kernel, bank in zip(self.choice.kernels(), self.dictionary.free_banks(), strict=True):
            x_hat, bank_sp, bank_perp = bank(self._counting(kernel, bank), x_hat, context)
            sp, perp = sp + bank_sp, perp + bank_perp
        return x_hat, sp, perp

    def _counting(self, kernel: BankKernel, bank: SlotBank) -> BankKernel:
        """The kernel, told how much the slots of a bank count in the orthogonality term."""
        if self.form.perp_on == "all":
            return kernel
        counted = perp_weight(bank.dependence)
        return lambda weights, *rest: kernel(weights._replace(perp_weight=counted), *rest)

    @torch.no_grad()
    def _note_activity(self, context: StepContext, step: int) -> None:
        """Which slots fired at this step, and the active entries that the next choice of kernels is made by."""
        for bank, stats in zip(self.dictionary.free_banks(), context.stats, strict=True):
            bank.last_fired.masked_fill_(stats.fired, step)
        if context.perp is not None:
            concepts = (context.perp.inv_norm > 0).sum()
            squares = [stats.squares for stats in context.stats if stats.squares is not None]
            self._correlations.append((squares, context.perp.rows, concepts))
        if not self.choice.pinned:
            # Every data rank must choose alike, since kernels reduce over data ranks in backward too.
            active = torch.stack([stats.active for stats in context.stats])
            rows = torch.full_like(active, len(context.x))
            self.choice.note(self.topology.sum_over_data(torch.stack([active, rows])))

    @torch.no_grad()
    def take_up(self, l0: float = 0.0, target: float | None = None) -> None:
        """After an update that was made: the dependence of slots follows the batch, and so do the gates.

        l0: mean number of active free slots of a row of the global batch; target: how many are wanted, None where no
        gate aims at a number.
        """
        for squares, rows, concepts in self._correlations:
            for bank, of_bank in zip(self.dictionary.free_banks(), squares, strict=True):
                bank.dependence.copy_(followed_dependence(bank.dependence, of_bank, rows, concepts))
        self.forget()
        if target is not None:
            for bank in self.dictionary.free_banks():
                bank.gate.follow(bank, l0, target)

    def forget(self) -> None:
        """After an update that was not made: nothing follows its batch."""
        self._correlations.clear()

    def bank_kernels(self) -> dict[str, str]:
        """Name of the kernel that each bank held here is computed with next: unit -> kernel."""
        return {bank_unit(i): name for i, name in zip(self.dictionary.owned, self.choice.names(), strict=True)}

    @torch.no_grad()
    def reconstruct(self, acts: Tensor, align: bool) -> tuple[Tensor, Tensor]:
        """Normalised activations x and their reconstruction in fp32, [B, D] each, of raw activations [B, D].

        Called on all dictionary ranks.
        """
        x = self.dictionary.normalise(acts)
        x_hat, _, _ = self._visit_banks(StepContext(x, None, None))
        x_hat = self.topology.sum_over_dictionary(x_hat)
        if align:
            x_hat = x_hat + self.dictionary.concepts(self._concept_path, x)[2]
        return x, self.dictionary.output(x_hat)

    def _meet_dictionary(self, x_hat: Tensor, perp: Orthogonality | None) -> tuple[Tensor, Tensor | None]:
        """Add up the partial reconstructions of the dictionary ranks, and the gradients to the concept code, in one
        reduction."""
        gradient = None if perp is None else perp.concept_gradient()
        if self.topology.dictionary_group is None:
            return x_hat, gradient
        parts = x_hat if gradient is None else torch.cat([x_hat, gradient], dim=1)
        total = SumForward.apply(parts, self.topology.sum_over_dictionary)
        width = x_hat.shape[1]
        return total[:, :width], None if gradient is None else total[:, width:].detach()

    def _value(self, z_concept: Tensor, answer: Tensor) -> Tensor:
        head = self.dictionary.value_head
        if head is None:
            return z_concept.new_zeros(())
        bf16 = self.concept_dtype == torch.bfloat16
        with torch.autocast(z_concept.device.type, torch.bfloat16, enabled=bf16):
            logits = head(z_concept)
        return _summed_cross_entropy(logits.float(), answer)

    @torch.no_grad()
    def _share(self, sums: dict[str, Any]) -> Tensor:
        """This rank's share of SUMS, fp64.

        What dictionary ranks compute alike counts on the first of them only, and perp, a figure of the global batch, on
        one data rank.
        """
        device = self.topology.device
        once = dict.fromkeys(SUMS, self.topology.dictionary_rank == 0)
        once |= {"sp": True, "active": True, "perp": self.topology.data_rank == 0}
        values = {n: torch.as_tensor(sums[n] if once[n] else 0.0, dtype=torch.float64, device=device) for n in SUMS}
        return torch.stack(list(values.values()))


def _summed_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    if logits.shape[1] == 0:
        return logits.new_zeros(())
    return F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
