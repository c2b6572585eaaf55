"""The loss: its table of terms, their weights and form, and the whole objective in plain PyTorch.

What is plain here is short, obvious, and the oracle that the fused objective is tested against. A new term is a row of
TERMS, a field of LossWeights and of StageWeights, a function and its line in `plain_objective`; and its fused form in
objective.py.

Shapes: B rows, D width, R concepts, K free slots, M labels of a row at most, A answers. Means run over the rows given;
labels are those of trainer.labels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.dictionary import BankWeights, steps
from trainer.errors import UserError
from trainer.labels import known, listing, membership

# A slot whose variance is below this share of its mean square is constant for fp32: its correlation is 0, not noise.
CONSTANT_SHARE = 1e-6

MOST_WEIGHT = 1e38  # more is no fp32
STAGES = ("pretrain", "align")  # in pretrain the concept slots sleep
# What a mean may run over, beside the steps of a log interval. Labelled is a row that the binding term counts.
COUNTS = ("rows", "labelled", "answered")


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    name: of its weight and of its figure `loss/NAME`. mean_over: one of COUNTS, or "steps" for a figure of the whole
        batch.
    stages: in which it counts. always: whether it is measured where its weight is 0.
    """

    name: str
    mean_over: str
    stages: tuple[str, ...] = STAGES
    always: bool = True

    def counts_in(self, stage: str) -> bool:
        """Whether the term is part of the loss of a stage."""
        return stage in self.stages


TERMS = (
    Term("rec", "rows"),
    Term("sp", "rows"),
    Term("pull", "rows", always=False),
    Term("bind", "labelled", ("align",)),
    Term("perp", "steps", ("align",), always=False),
    Term("val", "answered", ("align",)),
    Term("sp_concept", "rows", ("align",)),
)


@dataclass
class LossWeights:
    """Weight of each term."""

    rec: float = 1.0  # reconstruction
    sp: float = 0.05  # sparsity of the free slots; with the gate jumprelu what an active slot costs
    pull: float = 0.0  # distance of dead slots to their thresholds (gate jumprelu)
    bind: float = 1.0  # binding of concept slots to their concepts
    perp: float = 0.01  # orthogonality of free to concept slots
    val: float = 0.1  # answers from the concept code
    sp_concept: float = 0.0  # sparsity of the concept slots

    def validate(self) -> None:
        """Raise UserError for a weight that cannot be."""
        for term in TERMS:
            _check_weight(f"loss.{term.name}", getattr(self, term.name))

    def override(self, stage: "StageWeights") -> "LossWeights":
        """These weights, where the stage does not name others."""
        return replace(self, **{name: value for name, value in vars(stage).items() if value is not None})


@dataclass
class StageWeights:
    """Weights that differ from `loss` in one stage; what is unset stays."""

    rec: float | None = None  # null: loss.rec
    sp: float | None = None  # null: loss.sp
    pull: float | None = None  # null: loss.pull
    bind: float | None = None  # null: loss.bind
    perp: float | None = None  # null: loss.perp
    val: float | None = None  # null: loss.val
    sp_concept: float | None = None  # null: loss.sp_concept

    def validate(self, where: str) -> None:
        """Raise UserError for a weight that cannot be; `where` names the stage."""
        for name, value in vars(self).items():
            if value is not None:
                _check_weight(f"{where}.loss.{name}", value)


@dataclass
class LossForm:
    """Form of the terms, one for the whole run."""

    bind_on: str = "pre"  # logits of the binding term: pre (pre-activations) | code (the paper's letter)
    # Concepts exclude each other (softmax), are independent (sigmoid), or a slot is to be 1 where its concept is and 0
    # elsewhere (squares; with bind_on=code the paper's letter).
    binding: str = "softmax"
    bind_balance: bool = False  # sigmoid: of each concept, rows with it weigh as much as rows without it
    # Slots that the orthogonality term sees: dependent (on a concept) | all (the paper's letter).
    perp_on: str = "dependent"
    # Gate jumprelu: width of the window around a threshold whose entries give it a gradient, where rows have norm 1.
    bandwidth: float = 0.01

    def validate(self) -> None:
        """Raise UserError for words that are unknown or do not go together."""
        bindings = ("softmax", "sigmoid", "squares")
        known_words = {"bind_on": ("pre", "code"), "binding": bindings, "perp_on": ("dependent", "all")}
        for name, words in known_words.items():
            if getattr(self, name) not in words:
                raise UserError(f"loss.{name}={getattr(self, name)!r} is unknown; use {' or '.join(words)}")
        if not 1e-9 <= self.bandwidth <= 1e9:
            raise UserError(f"loss.bandwidth={self.bandwidth} must be between 1e-9 and 1e9")
        if self.binding == "sigmoid" and self.bind_on == "code":
            raise UserError(
                "loss.binding=sigmoid takes a logit below 0 for a concept that is absent, and a code is never below 0; "
                "set loss.bind_on=pre"
            )
        if self.binding != "sigmoid" and self.bind_balance:
            raise UserError(
                "loss.bind_balance weighs rows that have a concept against those that do not, which only "
                "loss.binding=sigmoid counts; set that, or bind_balance=false"
            )

    def counted(self, concept: Tensor) -> Tensor:
        """Which rows of labels [B, M] the binding term counts, bool [B]."""
        return listing(concept) if self.binding == "softmax" else known(concept)


@dataclass
class LossConfig(LossWeights, LossForm):
    """The section `loss`: weights, which a stage may override, and the form of the loss, which it may not."""

    sp_warmup: int = 0  # steps from the start of the run over which the sparsity weight rises linearly from 0

    def validate(self) -> None:
        """Raise UserError for a weight, word or number of steps that cannot be."""
        LossWeights.validate(self)
        LossForm.validate(self)
        if not 0 <= self.sp_warmup <= 1 << 50:
            raise UserError(f"loss.sp_warmup={self.sp_warmup} must be between 0 and {1 << 50}")

    def weights(self) -> LossWeights:
        """The weights alone."""
        return LossWeights(**{field.name: getattr(self, field.name) for field in fields(LossWeights)})

    def form(self) -> LossForm:
        """The form alone."""
        return LossForm(**{field.name: getattr(self, field.name) for field in fields(LossForm)})


def _check_weight(name: str, value: float) -> None:
    if not 0 <= value <= MOST_WEIGHT:
        raise UserError(f"{name}={value} must be a finite number between 0 and {MOST_WEIGHT:g}")


Number = TypeVar("Number", Tensor, float)


def term_means(sums: Mapping[str, Number], counts: Mapping[str, Number]) -> dict[str, Number]:
    """Each term's mean, from its sum and the counts that means run over (one per Term.mean_over, above 0)."""
    return {term.name: sums[term.name] / counts[term.mean_over] for term in TERMS}


def weighted(means: Mapping[str, Number], weights: LossWeights) -> Number:
    """The loss: the weighted sum of the terms' means."""
    total: Any = 0.0
    for name, mean in means.items():
        total = total + getattr(weights, name) * mean
    return total


@dataclass
class PlainDictionary:
    """What the plain objective needs of a dictionary: all free slots as one bank, the concept slots, b_dec [D], V or
    None."""

    free: BankWeights
    concepts: BankWeights
    b_dec: Tensor
    value_head: nn.Module | None = None


def plain_objective(
    dictionary: PlainDictionary, x: Tensor, concept: Tensor, answer: Tensor, align: bool, form: LossForm
) -> dict[str, Tensor]:
    """The mean of every term on normalised activations x [B, D], concept [B, M], answer [B]; `weighted` makes the loss
    of them.

    Without `align` the concept slots sleep, and the terms of stage align are 0.
    """
    free = dictionary.free
    z = free.encode(x)
    x_hat = free.decode(z) + dictionary.b_dec
    means = {term.name: x.new_zeros(()) for term in TERMS}
    if free.threshold is None or not free.bandwidth:
        means["sp"] = sparsity(z, free.decoder())
    else:
        pre = free.pre_activations(x)
        means["sp"] = steps(pre, free.threshold, free.bandwidth).sum(dim=1).mean()
        if free.dead is not None:
            means["pull"] = pull(pre[:, free.dead], free.threshold[free.dead], free.decoder()[free.dead])
    if align:
        pre = dictionary.concepts.pre_activations(x)
        z_concept = dictionary.concepts.encode(x)
        x_hat = x_hat + dictionary.concepts.decode(z_concept)
        if z_concept.shape[1]:
            logits = pre if form.bind_on == "pre" else z_concept
            term: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
                "softmax": binding,
                "sigmoid": partial(independent, balance=form.bind_balance),
                "squares": squares,
            }
            means["bind"] = term[form.binding](logits, concept)
            means["sp_concept"] = sparsity(z_concept, dictionary.concepts.decoder())
            means["perp"] = orthogonality(z_concept, z, free.perp_weight)
        if dictionary.value_head is not None:
            means["val"] = value(dictionary.value_head(z_concept), answer)
    means["rec"] = reconstruction(x, x_hat)
    return means


def reconstruction(x: Tensor, x_hat: Tensor) -> Tensor:
    """L_rec: mean over rows of ||x - x_hat||^2; x, x_hat [B, D]."""
    return (x - x_hat).square().sum(dim=1).mean()


def sparsity(z: Tensor, decoder: Tensor) -> Tensor:
    """L_sp: mean over rows of sum_j ||W_dec_j|| z_j; z [B, n], decoder [n, D] as used in the reconstruction."""
    return (z * decoder.norm(dim=1)).sum(dim=1).mean()


def pull(pre: Tensor, threshold: Tensor, decoder: Tensor) -> Tensor:
    """L_pull: mean over rows of sum_j ||W_dec_j|| max(threshold_j - pre_j, 0) over the dead slots, of which these are
    pre-activations [B, m], thresholds [m] and decoder rows [m, D] ("Circuits Updates - January 2025", "pre-activation
    loss")."""
    return ((threshold - pre).relu() * decoder.norm(dim=1)).sum(dim=1).mean()


def binding(logits: Tensor, concept: Tensor) -> Tensor:
    """L_bind (AlignSAE): cross-entropy of logits [B, R] with the concepts [B, M] that a row lists, each as likely as
    the others, over rows that list one; 0 without any."""
    member = membership(concept, logits.shape[1]).to(logits.dtype)
    target = member / member.sum(dim=1, keepdim=True).clamp_min(1)
    return -(target * logits.log_softmax(dim=1)).sum() / listing(concept).sum().clamp_min(1)


def independent(logits: Tensor, concept: Tensor, balance: bool) -> Tensor:
    """L_bind with independent concepts: the mean over rows [B, M] that are not unknown of the sum over concepts of the
    binary cross-entropy of logits [B, R] with whether the row lists them; 0 without such a row.

    With `balance` the rows with a concept and those without it have the same weight in sum, one half of the rows each;
    a concept that all of these rows have, or none, has one half of their weight.
    """
    rows = known(concept)
    member = membership(concept[rows], logits.shape[1])
    each = F.binary_cross_entropy_with_logits(logits[rows], member.to(logits.dtype), reduction="none")
    n, positives = rows.sum(), member.sum(dim=0)
    if balance:
        each = each * n / (2 * torch.where(member, positives, n - positives))
    return each.sum() / n.clamp_min(1)


def squares(logits: Tensor, concept: Tensor) -> Tensor:
    """L_bind as AlignSAE writes it: the mean squared difference of logits [B, R] and the one-hot of the concept, over
    concepts and rows [B, M] that are not unknown; 0 without such a row."""
    rows = known(concept)
    target = membership(concept[rows], logits.shape[1]).to(logits.dtype)
    return (logits[rows] - target).square().mean(dim=1).sum() / rows.sum().clamp_min(1)


def value(answer_logits: Tensor, answer: Tensor) -> Tensor:
    """L_val (AlignSAE): cross-entropy of V(z_concept) [B, A] with answer [B], over rows that have one; 0 without
    any."""
    answered = (answer >= 0).sum().clamp_min(1)
    return F.cross_entropy(answer_logits, answer, ignore_index=-1, reduction="sum") / answered


def standardise(z: Tensor) -> Tensor:
    """Columns of z [B, n], centred and divided by their norm; a constant column becomes 0."""
    centred = z - z.mean(dim=0)
    return centred * inverse_norm(centred.square().sum(dim=0), z.square().sum(dim=0))


def inverse_norm(centred: Tensor, square: Tensor) -> Tensor:
    """One over the norm [n] of centred columns, from their sums of squares after and before centring; 0 for a constant
    column."""
    return torch.where(centred <= CONSTANT_SHARE * square, torch.zeros_like(centred), centred.clamp_min(1e-38).rsqrt())


def orthogonality(z_concept: Tensor, z_rest: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_perp: ||corr(z_concept, z_rest)||_F^2 over the rows given, [B, R] and [B, K].

    A free slot counts as often as weight [K] says (None: once each, which is AlignSAE's letter; see
    following.perp_weight).
    """
    squares = (standardise(z_concept).T @ standardise(z_rest)).square().sum(dim=0)
    return squares.sum() if weight is None else (squares * weight).sum()
