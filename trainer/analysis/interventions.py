"""Concept swap on a running language model, and what the reconstruction costs it.

Shapes: B prompts of a batch, D model width, R concepts. An edit maps the residual h [B, D] at the last prompt token
of the B prompts to the residual that the remaining blocks read; row i belongs to prompt i.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.dictionary import ConceptDictionary
from trainer.errors import UserError
from trainer.language_model import Edit, EditableModel, Match, Prompt, answer_matches

EditFor = Callable[[Tensor, Tensor], Edit]  # (source [B], target [B]) -> edit of B rows


@dataclass(frozen=True)
class Swap:
    """One attempt: ask `prompt` about relation `source`, make the model answer `target` of the same subject."""

    prompt: str
    source: int
    target: int
    source_answer: str
    target_answer: str
    subject: str = ""


def swap_pairs(
    records: Sequence[Prompt],
    concepts: Sequence[str],
    *,
    split: str | None,
    pairs: int,
    seed: int,
    match: Match = answer_matches,
) -> list[Swap]:
    """Up to `pairs` swaps, spread evenly over the ordered relation pairs and drawn without repetition.

    Args:
        records: prompts that name a concept, a subject and an answer; others are passed over.
        concepts: names in slot order.
        split: prompts of this split only (None = all); answers are looked up over all records.

    A pair whose two answers match each other is left out, because it would succeed without an edit.
    Raises UserError when nothing is left to swap.
    """
    slot = {name: index for index, name in enumerate(concepts)}
    known = [r for r in records if r.concept in slot and r.subject and r.answer]
    answers = {(r.subject, slot[r.concept]): r.answer for r in known}
    chosen = [r for r in known if split is None or r.split == split]
    if not chosen:
        raise UserError(
            f"no prompt of split {split!r} names a subject and one of the concepts {', '.join(concepts)}; "
            "check --prompts and --split"
        )
    rng = np.random.default_rng(seed)
    queues = []
    for source in range(len(concepts)):
        asked = [r for r in chosen if slot[r.concept] == source]
        for target in range(len(concepts)):
            if target == source:
                continue
            swaps = [
                Swap(r.prompt, source, target, r.answer, other, r.subject)
                for r in (asked[i] for i in rng.permutation(len(asked)))
                if (other := answers.get((r.subject, target)))
                and not match(other, r.answer)
                and not match(r.answer, other)
            ]
            queues.append(iter(swaps))
    picked: list[Swap] = []
    while queues and len(picked) < pairs:
        # One of each relation pair in turn, so that every cell of the matrix has as many swaps as every other.
        taken = [(queue, swap) for queue in queues for swap in islice(queue, 1)]
        queues = [queue for queue, _ in taken]
        picked += [swap for _, swap in taken]
    if not picked:
        raise UserError(
            "no subject has two concepts with different answers, so there is nothing to swap; check --prompts"
        )
    return picked[:pairs]


def generate_edited(
    editable: EditableModel,
    swaps: Sequence[Swap],
    edit_for: EditFor,
    max_new_tokens: int,
    progress: Callable[[int], Any] = lambda n: None,
) -> list[str]:
    """Greedy answers to the swaps' prompts under `edit_for(source [B], target [B])`, in order."""
    texts: list[str] = []
    for part in editable.batches(swaps):
        texts += editable.read([s.prompt for s in part]).answers(edit_of(part, edit_for), max_new_tokens)
        progress(len(part))
    return texts


def edit_of(swaps: Sequence[Swap], edit_for: EditFor) -> Edit:
    """The edit of B swaps."""
    return edit_for(torch.tensor([s.source for s in swaps]), torch.tensor([s.target for s in swaps]))


@dataclass
class SwapScore:
    """What the model answered. kinds[i] belongs to swap i: target_answer (success), source_answer (unchanged),
    target_category (an answer of the target relation that belongs to somebody else) or other."""

    kinds: list[str]

    def where(self, applied: Tensor, otherwise: "SwapScore") -> "SwapScore":
        """This score where `applied` [n] bool, another one's elsewhere."""
        both = zip(applied.tolist(), self.kinds, otherwise.kinds, strict=True)
        return SwapScore([here if edited else there for edited, here, there in both])

    def share(self, kind: str) -> float:
        """Share of the swaps that ended as `kind`."""
        return self.kinds.count(kind) / len(self.kinds)

    @property
    def success(self) -> float:
        """Share of answers that match the target relation's answer of the same subject."""
        return self.share("target_answer")

    @property
    def category_kept(self) -> float:
        """Share of answers that belong to the target relation's answer set (successes included)."""
        return self.success + self.share("target_category")

    @property
    def category_kept_of_failures(self) -> float | None:
        """Share of the failed swaps whose answer belongs to the target relation's answer set; None without failures."""
        failures = len(self.kinds) - self.kinds.count("target_answer")
        return self.kinds.count("target_category") / failures if failures else None


def score_swaps(
    swaps: Sequence[Swap],
    texts: Sequence[str],
    answer_sets: Sequence[frozenset[str]],
    match: Match = answer_matches,
) -> SwapScore:
    """Compare generated texts with the expected answers. answer_sets[r] holds all answers of relation r."""

    def kind(swap: Swap, text: str) -> str:
        if match(text, swap.target_answer):
            return "target_answer"
        if match(text, swap.source_answer):
            return "source_answer"
        if any(match(text, answer) for answer in answer_sets[swap.target]):
            return "target_category"
        return "other"

    return SwapScore([kind(s, t) for s, t in zip(swaps, texts, strict=True)])


def answer_sets(records: Sequence[Prompt], concepts: Sequence[str]) -> list[frozenset[str]]:
    """All answers of each concept, in slot order."""
    return [frozenset(r.answer for r in records if r.concept == name and r.answer) for name in concepts]


@torch.no_grad()
def answer_loss(
    editable: EditableModel,
    records: Sequence[Prompt],
    edit: Edit | None = None,
    *,
    progress: Callable[[int], Any] = lambda n: None,
) -> float:
    """Mean cross-entropy (nats per token) of the answers after their prompts, with `edit` at the last prompt token."""
    order = sorted(records, key=lambda r: len(r.prompt))  # little padding
    total, tokens = 0.0, 0
    for part in editable.batches(order):
        found, count = editable.read([r.prompt for r in part]).cross_entropy([r.answer for r in part], edit)
        total, tokens = total + float(found), tokens + count
        progress(len(part))
    return total / tokens


def loss_recovered(
    editable: EditableModel,
    records: Sequence[Prompt],
    dictionary: ConceptDictionary,
    progress: Callable[[int], Any] = lambda n: None,
) -> dict[str, float | None]:
    """Cross-entropy of the answers (nats per token) with h, h_hat, the mean activation and 0 at the last prompt token,
    and the shares recovered: (CE of the ablation - CE of h_hat) / (CE of the ablation - CE of h), None for x / 0.
    """
    return shares_recovered(
        {name: answer_loss(editable, records, edit, progress=progress) for name, edit in ablations(dictionary).items()}
    )


def ablations(dictionary: ConceptDictionary) -> dict[str, Edit | None]:
    """What activations [B, D] are replaced by to tell what the reconstruction is worth, by name."""
    return {
        "original": None,
        "reconstruction": lambda h: dictionary.reconstruct(h).to(h.dtype),
        "mean": lambda h: dictionary.mean.to(h.dtype).expand_as(h),
        "zero": torch.zeros_like,
    }


def shares_recovered(loss: Mapping[str, float]) -> dict[str, float | None]:
    """The cross-entropies (nats per token) under each of `ablations`, and the shares of loss recovered."""

    def recovered(ablation: str) -> float | None:
        harm = loss[ablation] - loss["original"]
        return (loss[ablation] - loss["reconstruction"]) / harm if harm else None

    return {
        **{f"cross_entropy_{name}": value for name, value in loss.items()},
        "recovered_over_mean": recovered("mean"),
        "recovered_over_zero": recovered("zero"),
    }
