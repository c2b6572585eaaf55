"""AlignObjective: the fused top-level loss module. Its forward takes rows and returns the loss, bank by bank, never holding a whole code.

Shapes: B rows of this rank, G of the global batch, D width, R concepts, n slots of a bank, A answers. Formulas: docs/design.md, "The numbers".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.dictionary import ConceptDictionary
from trainer.kernels import BankStep, KernelChoice, PerpStep, RowPairs
from trainer.losses import LossConfig
from trainer.topology import Topology

# With fewer concepts their products cost nothing in fp32 (at 64, under 1% of a step), so that there is nothing to round for.
LOW_CONCEPTS = 64


@dataclass
class Rows:
    """The rows that one forward sees, and how many the global batch has.

    acts [B, D] raw activations; concept [B] and answer [B] int64, -1 = none;
    counts [3] fp32: rows, labelled rows and answered rows of the global batch (all ranks, all micro-batches).
    """

    acts: Tensor
    concept: Tensor
    answer: Tensor
    counts: Tensor


# Sums over rows that add up over ranks and micro-batches to the figures of the global batch.
SUMS = ("rows", "labelled", "answered", "rec", "sp", "bind", "perp", "val", "variance", "active", "bound")


class AlignObjective(nn.Module):
    """The dictionary with its training loss.

    Args:
        dictionary: weights; under dictionary parallelism it holds only this rank's free banks.
        config: form of the loss (weights come with each call, since they follow the curriculum).
        topology: where this rank stands in the mesh.
        kernel: auto, or the name of one kernel (trainer/kernels).
        precision: fp32, or bf16 for bf16 products on fp32 masters.
    """

    def __init__(
        self,
        dictionary: ConceptDictionary,
        config: LossConfig,
        topology: Topology,
        *,
        kernel: str = "auto",
        precision: str = "fp32",
    ):
        super().__init__()
        self.dictionary = dictionary
        self.bind_on = config.bind_on
        self.topology = topology
        self.choice = KernelChoice(kernel, len(dictionary.owned), topology.device)
        self.low_dtype = torch.bfloat16 if precision == "bf16" else None
        self.concept_dtype = self.low_dtype if len(dictionary.concept_names) >= LOW_CONCEPTS else None
        self._densities: Tensor | None = None

    def forward(self, rows: Rows, weights: LossConfig, align: bool, step: int) -> tuple[Tensor, Tensor]:
        """Loss of one (micro-)batch.

        Args:
            rows: see Rows.
            weights: the five weights at this step.
            align: whether the concept slots are awake (stage align).
            step: global step, noted by slots that fire.

        Returns:
            loss, a scalar for backward, scaled so that its gradient averaged over data ranks is that of the global loss; and
            sums [11] fp64, this rank's share of SUMS, without gradient.
        """
        self.settle()
        topology = self.topology
        x = self.dictionary.normalise(rows.acts)
        x_low = None if self.low_dtype is None else x.to(self.low_dtype)
        # Asleep, the concept path runs on no rows: every parameter still gets a (zero) gradient, which every engine needs.
        awake = len(x) if align else 0
        concept, answer = rows.concept[:awake], rows.answer[:awake]
        operand = x if x_low is None or self.concept_dtype is None else x_low
        pre, z_concept, x_hat_concept = self.dictionary.concepts(self._concept_path, operand[:awake])

        use_perp = align and weights.perp > 0 and z_concept.shape[1] > 0
        perp_step = self._perp_step(z_concept.detach(), rows.counts[0].clamp_min(1)) if use_perp else None
        bank_step = BankStep(x, x_low, self.dictionary.config.decoder_norm, perp_step)
        x_hat, sp, perp = self._visit_banks(bank_step)
        self._note_activity(bank_step, step)
        x_hat, concept_gradient = self._meet_dictionary(x_hat, perp_step)
        if align:
            x_hat = x_hat + x_hat_concept
        x_hat = self.dictionary.output(x_hat)

        rec = (x - x_hat).square().sum()
        logits = pre if self.bind_on == "pre" else z_concept
        bind = _summed_cross_entropy(logits, concept)
        val = self._value(z_concept, answer)
        world = topology.data_world
        total, labelled, answered = rows.counts.clamp_min(1).unbind()
        loss = (weights.rec * rec + weights.sp * sp) * (world / total)
        loss = loss + weights.bind * bind * (world / labelled) + weights.val * val * (world / answered)
        if concept_gradient is not None:
            loss = loss + weights.perp * world * (perp + _Attach.apply(z_concept, concept_gradient))
        if not align:
            loss = loss + 0.0 * x_hat_concept.sum()

        with torch.no_grad():
            bound = (logits.argmax(dim=1) == concept).sum() if logits.shape[1] else 0
            shared = {  # dictionary ranks compute these alike
                "rows": len(x),
                "labelled": (rows.concept >= 0).sum(),
                "answered": (rows.answer >= 0).sum(),
                "rec": rec,
                "bind": bind,
                "val": val,
                "variance": x.square().sum(),
                "bound": bound,
                "active": (z_concept > 0).sum(),
            }
            own = {"sp": sp, "active": sum(s.active for s in bank_step.stats)}
            if topology.data_rank == 0:  # a figure of the global batch, the same on every data rank
                own["perp"] = perp
            return loss, self._share(shared, own, x)

    @staticmethod
    def _concept_path(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations [B, R], code [B, R] and part of the reconstruction [B, D] of the concept slots: fp32, from products in the dtype of x."""
        # The bias is added in fp32: what is trained in it would be lost in the rounding of a bf16 sum.
        pre = (x @ W_enc.to(x.dtype).T).float() + b_enc
        z = torch.relu(pre)
        return pre, z, (z.to(x.dtype) @ W_dec.to(x.dtype)).float()

    def _perp_step(self, z: Tensor, total: Tensor) -> PerpStep:
        """What banks need of the concept code [B, R]."""
        perp = PerpStep.standardise(z, total, self.topology.sum_over_data)
        if self.topology.data_world == 1:
            slots = sum(bank.slots for bank in self.dictionary.free_banks())
            perp.pairs = RowPairs(perp.concept, total, slots, self.low_dtype or torch.float32)
        return perp

    def _visit_banks(self, bank_step: BankStep) -> tuple[Tensor, Tensor, Tensor]:
        """The chain of free banks: reconstruction [B, D], and the sums of sp and perp over banks."""
        x_hat = torch.zeros_like(bank_step.x)
        sp = perp = x_hat.new_zeros(())
        for number, bank in enumerate(self.dictionary.free_banks()):
            x_hat, bank_sp, bank_perp = bank(self.choice.kernel(number), x_hat, bank_step)
            sp, perp = sp + bank_sp, perp + bank_perp
        return x_hat, sp, perp

    def _note_activity(self, bank_step: BankStep, step: int) -> None:
        """Which slots fired at this step, and the densities that the next choice of kernels sees."""
        for bank, stats in zip(self.dictionary.free_banks(), bank_step.stats, strict=True):
            bank.last_fired.masked_fill_(stats.fired, step)
        if not self.choice.pinned:
            # Every data rank must choose alike, since kernels reduce over data ranks in backward too.
            active = torch.stack([s.active for s in bank_step.stats])
            self._densities = self.topology.sum_over_data(
                torch.stack([active, torch.full_like(active, len(bank_step.x))])
            )

    @torch.no_grad()
    def reconstruct(self, acts: Tensor, align: bool) -> tuple[Tensor, Tensor]:
        """Normalised activations x and their reconstruction in fp32, [B, D] each, of raw activations [B, D]. Called on all dictionary ranks."""
        x = self.dictionary.normalise(acts)
        x_hat, _, _ = self._visit_banks(BankStep(x, None, self.dictionary.config.decoder_norm, None))
        x_hat = self.topology.sum_over_dictionary(x_hat)
        if align:
            x_hat = x_hat + self.dictionary.concepts(self._concept_path, x)[2]
        return x, self.dictionary.output(x_hat)

    def settle(self) -> None:
        """Let the kernel choice see the densities of the last forward; called at the next one, and before a save."""
        if self._densities is None:
            return
        active, rows = self._densities.tolist()
        self._densities = None
        if rows[0]:  # a batch whose rows are all masked says nothing
            sizes = (bank.slots for bank in self.dictionary.free_banks())
            self.choice.observe([a / (r * n) for a, r, n in zip(active, rows, sizes, strict=True)])

    def _meet_dictionary(self, x_hat: Tensor, perp: PerpStep | None) -> tuple[Tensor, Tensor | None]:
        """Add up the partial reconstructions of the dictionary ranks, and the gradients to the concept code, in one reduction."""
        gradient = None
        if perp is not None:
            perp.settle()
            gradient = perp.grad_concept
        if self.topology.dictionary_group is None:
            return x_hat, gradient
        parts = x_hat if gradient is None else torch.cat([x_hat, gradient], dim=1)
        total = _SumForward.apply(parts, self.topology.sum_over_dictionary)
        width = x_hat.shape[1]
        return total[:, :width], None if gradient is None else total[:, width:].detach()

    def _value(self, z_concept: Tensor, answer: Tensor) -> Tensor:
        head = self.dictionary.value_head
        if head is None:
            return z_concept.new_zeros(())
        with torch.autocast(z_concept.device.type, self.concept_dtype, enabled=self.concept_dtype is not None):
            logits = head(z_concept)
        return _summed_cross_entropy(logits.float(), answer)

    def _share(self, shared: dict[str, Any], own: dict[str, Any], like: Tensor) -> Tensor:
        """This rank's share of SUMS [11] fp64; `shared` counts on the first dictionary rank only."""
        once = 1.0 if self.topology.dictionary_rank == 0 else 0.0
        values = [
            once * torch.as_tensor(shared.get(name, 0.0), dtype=torch.float64, device=like.device)
            + torch.as_tensor(own.get(name, 0.0), dtype=torch.float64, device=like.device)
            for name in SUMS
        ]
        return torch.stack(values)


def _summed_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    if logits.shape[1] == 0:
        return logits.new_zeros(())
    return F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")


class _Attach(torch.autograd.Function):
    """A scalar 0 whose gradient with respect to the input is known already."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return source.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None


class _SumForward(torch.autograd.Function):
    """Sum over ranks forward, identity backward: all ranks compute the same loss from the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream, None
