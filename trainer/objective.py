"""AlignObjective: the fused top-level loss module.

Its forward takes rows and returns the loss, bank by bank, never holding a whole code.

Shapes: B rows of this rank, G of the global batch, D width, R concepts, M labels of a row at most, n slots of a bank, A
answers. Formulas:
docs/design.md, "The numbers".
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.autograd import Attach, Idle, SumForward
from trainer.dictionary import BankWeights, ConceptDictionary, Joined, SlotBank, apply_gate, bank_unit
from trainer.following import dead_slots, followed_sparsity
from trainer.heads import Dependence, concept_slots, orthogonality, value
from trainer.kernels import KernelChoice, Orthogonality, RowPairs, RunKernel, StepContext
from trainer.kernels.interface import Result, end_to_end
from trainer.late import to_device
from trainer.losses import TERMS, LossForm, LossWeights
from trainer.sums import MEAN_OVER, OWN, SPARSITY, SUMS, MicroBatch, share_of_sums
from trainer.topology import Topology

# With fewer concepts their products cost nothing in fp32 (at 64, under 1% of a step), so that there is nothing to round
# for.
BF16_CONCEPTS = 64


class Look(NamedTuple):
    """What the dictionary makes of rows: x and its reconstruction [B, D] fp32; pre-activations [B, R] of the concept
    slots, [B, 0] while they sleep; active entries of the free slots held here, a scalar."""

    x: Tensor
    x_hat: Tensor
    pre: Tensor
    active: Tensor


class AlignObjective(nn.Module):
    """The dictionary with its training loss.

    Args:
        dictionary: weights; under dictionary parallelism it holds only this rank's free banks.
        topology: where this rank stands in the mesh.
        form: of the terms, None: the default one (weights come with each call, since they follow the curriculum).
        kernel: auto, or the name of one kernel (trainer/kernels).
        precision: fp32, or bf16 for bf16 products on fp32 masters.
        kernels: kernel of each bank held here to go on with; None: those of a new dictionary.
        dead_after: steps without firing after which the term `pull` counts a slot.
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
        dead_after: int = 1,
    ):
        super().__init__()
        self.dictionary = dictionary
        self.form = form or LossForm()
        self.topology = topology
        banks = list(dictionary.free_banks())
        self.dead_after = dead_after
        jumps = any(bank.jumps for bank in banks)
        self._jump: dict[str, Any] = {"bandwidth": self.form.bandwidth if jumps else 0.0}
        self.choice = KernelChoice(kernel, [bank.slots for bank in banks], topology.device, kernels, topology.lag)
        self.whole = True  # whether the weights of several banks can be had at a time; strategies say where not
        # What is multiplied with the weight of sparsity, fp64; None where nothing is.
        self.sparsity: Tensor | None = None
        # Of the last forward pass: each term's weight over the count of its mean, fp64.
        self.coefficients = torch.zeros(len(TERMS), dtype=torch.float64, device=topology.device)
        self._fired, self._dependence = Joined(banks, "last_fired"), Dependence(banks, self.choice.heads)
        self._gate = banks[0].gate if banks else None
        self._followed = {name: Joined(banks, name) for name in (self._gate.buffers(1, 1) if self._gate else ())}
        self._mean_over = torch.tensor(MEAN_OVER, device=topology.device)
        self._one, self._zero = torch.ones(1, device=topology.device), torch.zeros((), device=topology.device)
        self.product_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
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
        # Asleep, the concept slots see no rows. Where weights have to be lent they are lent for that, since every
        # engine needs a gradient of every parameter.
        awake = len(x) if align else 0
        skipped = self.whole and not align
        concept, answer = batch.concept[:awake], batch.answer[:awake]
        operand = (x if x_bf16 is None or self.concept_dtype == torch.float32 else x_bf16)[:awake]
        if skipped:
            z_concept = x.new_empty(0, len(self.dictionary.concept_names))
            x_hat_concept, sp_concept, bind, bound = x[:0], self._zero, self._zero, None
        else:
            z_concept, x_hat_concept, sp_concept, bind, bound = self.dictionary.concepts(
                concept_slots, operand, concept, self.form, batch.counts[1], batch.positives, self.choice.heads
            )

        use_perp = align and weights.perp > 0 and z_concept.shape[1] > 0
        rows = batch.counts[0] if batch.rows is None else batch.rows
        orthogonality = self._orthogonality(z_concept.detach(), rows) if use_perp else None
        context = StepContext(x, x_bf16, orthogonality, zero=self._zero)
        if self.choice.follows:
            context.room = self.choice.room(len(x))
        dead = self._dead(step) if weights.pull > 0 else None
        # Where dictionary ranks add up their shares, that of the concept slots comes after it.
        begins = align and topology.dictionary_group is None
        x_hat, sp, perp, pull = self._visit_banks(context, x_hat_concept if begins else None, dead)
        active = self._note_activity(context, step)
        x_hat, concept_gradient = self._meet_dictionary(x_hat, orthogonality)
        if align and not begins:
            x_hat = x_hat + x_hat_concept
        x_hat = self.dictionary.output(x_hat)

        if concept_gradient is not None:
            perp = Attach.apply(perp, z_concept, concept_gradient)
        sums = {"rec": F.mse_loss(x_hat, x, reduction="sum"), "sp": sp, "pull": pull, "bind": bind, "perp": perp}
        sums |= {"val": self._zero if skipped else self._value(z_concept, answer), "sp_concept": sp_concept}
        terms = torch.stack([sums[term.name] for term in TERMS])
        self.coefficients, share = self._coefficients(batch, weights)
        share = share_of_sums(share, batch, self.form, terms.detach(), context, active, bound, topology)
        # Engines average gradients over data ranks, while these sums are shares of the global batch.
        scaled = self.coefficients.float()
        if topology.data_world > 1:
            scaled = scaled * topology.data_world
        loss = terms @ scaled
        if align:
            return loss, share
        return (Idle.apply(loss, *self._asleep()) if skipped else loss + 0.0 * x_hat_concept.sum()), share

    def _asleep(self) -> list[nn.Parameter]:
        """What learns nothing while the concept slots sleep."""
        head = self.dictionary.value_head
        parameters = [*self.dictionary.concepts.parameters(), *([] if head is None else head.parameters())]
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _coefficients(self, batch: MicroBatch, weights: LossWeights) -> tuple[Tensor, Tensor]:
        """Each term's weight over the count of its mean in the global batch, and what `share_of_sums` begins with;
        fp64."""
        asked, share = [getattr(weights, term.name) for term in TERMS], [0.0] * len(SUMS)
        if batch.known is not None:
            counts = [max(count, 1.0) for count in (*batch.known, 1.0)]
            asked = [weight / counts[place] for weight, place in zip(asked, MEAN_OVER, strict=True)]
        if batch.own is not None:
            share[OWN] = batch.own
        sent = to_device([*asked, *share], torch.float64, self.topology.device)
        found, begun = sent.split([len(TERMS), len(SUMS)])
        if batch.known is None:
            found = found / torch.cat([batch.counts.clamp_min(1), self._one])[self._mean_over]
        if self.sparsity is not None:
            found[SPARSITY] *= self.sparsity
        return found, begun

    def _orthogonality(self, z: Tensor, rows: Tensor) -> Orthogonality:
        """What banks need of the concept code [B, R]."""
        found = orthogonality(z, rows, self.topology.sum_over_data, self.choice.heads)
        if self.topology.data_world == 1:
            slots = sum(bank.slots for bank in self.dictionary.free_banks())
            found.pairs = RowPairs(found.concept, found.rows, slots, self.product_dtype)
        return found

    def _visit_banks(
        self, context: StepContext, x_hat: Tensor | None = None, dead: list[Tensor] | None = None
    ) -> Result:
        """The chain of free banks: reconstruction [B, D], and the sums of sp, perp and pull over banks.

        x_hat: what the chain begins with, None: 0. dead: of each bank held here, the slots that the term `pull` counts.
        """
        banks = list(self.dictionary.free_banks())
        concepts = 0 if context.perp is None else context.perp.concept.shape[1]
        about = {} if dead is None else {"dead": dead}
        if concepts and self.form.perp_on != "all":
            about["perp_weight"] = self._dependence.counted()
        x_hat = self._zero.expand_as(context.x) if x_hat is None else x_hat
        total: list[Tensor] = []
        order = []
        for kernel, numbers in self.choice.runs(concepts, self.whole):
            told = [self._jump | {name: parts[number] for name, parts in about.items()} for number in numbers]
            x_hat, *sums = _lend([banks[i] for i in numbers], told, kernel, x_hat, context)
            total = [before + now for before, now in zip(total, sums, strict=True)] if total else sums
            order += numbers
        context.stats = [stats for _, stats in sorted(zip(order, context.stats, strict=True), key=lambda s: s[0])]
        sp, perp, pull = total or [self._zero] * 3
        return x_hat, sp, perp, pull

    @torch.no_grad()
    def _dead(self, step: int) -> list[Tensor]:
        """Of each bank held here, the slots [n] bool that are dead at a step, the same on all data ranks."""
        last_fired = self.topology.max_over_data(self._fired.whole())
        return self._fired.split(dead_slots(last_fired, step - 1, self.dead_after))

    @torch.no_grad()
    def _note_activity(self, context: StepContext, step: int) -> Tensor:
        """Which slots fired at this step, and the active entries by bank [banks], which are returned and which the next
        choice of kernels is made by."""
        stats = context.stats
        self._fired.whole().masked_fill_(end_to_end([of_bank.fired for of_bank in stats]), step)
        if context.perp is not None:
            self._dependence.note(stats, context.perp)
        counts = torch.stack([*context.needed, *(of_bank.active for of_bank in stats)])
        if self.choice.follows:
            # Every data rank must choose alike, since kernels reduce over data ranks in backward too.
            if self.topology.data_world == 1:
                self.choice.note(counts, len(context.x))
            else:
                rows = to_device([len(context.x)], counts.dtype, self.topology.device)
                self.choice.note(self.topology.sum_over_data(torch.cat([counts, rows])))
        return counts[len(context.needed) :]

    @torch.no_grad()
    def take_up(
        self, made: Tensor, l0: Tensor | None = None, target: float | Tensor | None = None, weighted: bool = False
    ) -> None:
        """After a step: the dependence of slots follows the batch, and so do gates and the weight of sparsity.

        Args:
            made: whether the update was, a scalar bool; nothing follows where it was not.
            l0: mean number of active free slots of a row of the global batch, a scalar.
            target: how many are wanted; None where none are.
            weighted: whether sparsity had a weight.
        """
        self._dependence.follow(made)
        if target is None or l0 is None:
            return
        seen = torch.where(made, l0, target)  # as wanted: nothing changes
        if self._gate is not None:
            self._gate.follow({name: joined.whole() for name, joined in self._followed.items()}, seen, target)
        if self.sparsity is not None and weighted:
            self.sparsity = followed_sparsity(self.sparsity, seen, target)

    def bank_kernels(self) -> dict[str, str]:
        """Name of the kernel that each bank held here is computed with next: unit -> kernel."""
        return {bank_unit(i): name for i, name in zip(self.dictionary.owned, self.choice.names(), strict=True)}

    @torch.no_grad()
    def look(self, acts: Tensor, align: bool) -> Look:
        """At raw activations [B, D] of any float dtype, in fp32 products; it changes nothing.

        Called on all dictionary ranks.
        """
        x = self.dictionary.normalise(acts)
        context = StepContext(x, None, None, zero=self._zero)
        x_hat, *_ = self._visit_banks(context)
        x_hat, pre = self.topology.sum_over_dictionary(x_hat), x.new_zeros(len(x), 0)
        if align:
            pre, concept_share = self.dictionary.concepts(_seen, x)
            x_hat = x_hat + concept_share
        active = torch.stack([stats.active for stats in context.stats]).sum()
        return Look(x, self.dictionary.output(x_hat), pre, active)

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
        bf16 = self.concept_dtype == torch.bfloat16
        return value(self.dictionary.value_head, z_concept, answer, bf16, self.choice.heads)


def _seen(weights: BankWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations [B, R] of concept slots on x [B, D], and their share of the reconstruction [B, D]."""
    pre = weights.pre_activations(x)
    return pre, weights.decode(apply_gate(pre, weights.threshold))


def _lend(
    banks: list[SlotBank], told: list[dict[str, Any]], kernel: RunKernel, recon: Tensor, context: StepContext
) -> Result:
    """A kernel's result on these banks, told what the objective knows about the slots of each (see BankWeights)."""

    def use(lent: Sequence[BankWeights], recon: Tensor) -> Result:
        return kernel([weights._replace(**known) for weights, known in zip(lent, told, strict=True)], recon, context)

    if len(banks) > 1:
        return use([bank.weights() for bank in banks], recon)
    # A bank that is not whole lends its weights by a call of the module, which gathers them; ZeRO-3 lets them go again
    # when the gradient of an input of that call is there, so recon has to be one.
    return banks[0](lambda lent, recon: use([lent], recon), recon)
