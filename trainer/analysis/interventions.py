"""Concept swap on a running language model, and what the reconstruction costs it.

Shapes: B prompts of a batch, D model width, R concepts. An edit maps the residual h [B, D] at the last prompt token
of the B prompts to the residual that the remaining blocks read; row i belongs to prompt i.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from trainer.analysis.language_model import (
    Match,
    Prompt,
    answer_matches,
    edit_residual,
    encode_answer,
    generate_answers,
)
from trainer.analysis.steering import SlotEdit
from trainer.dictionary import ConceptDictionary
from trainer.errors import UserError

Edit = Callable[[Tensor], Tensor]
WriteBack = Literal["add", "replace"]


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


def slot_swap(
    dictionary: ConceptDictionary, source: Tensor, target: Tensor, strength: Tensor, write_back: WriteBack = "add"
) -> Edit:
    """Edit that sets slot source[i] to 0 and slot target[i] to strength[target[i]].

    source, target [B] int64; strength [R] in units of the code, normally alpha times `evaluation.concept_slot_means`.
    add: h + decode(z') - decode(z), which keeps what the dictionary does not reconstruct. replace: decode(z').
    """
    slots = torch.cat([source, target]).unique()
    row, value = torch.arange(len(source)), torch.full((len(source), len(slots)), torch.nan)
    value[row, torch.searchsorted(slots, source)] = 0.0
    value[row, torch.searchsorted(slots, target)] = strength.cpu()[target]
    change = SlotEdit(dictionary, slots.tolist(), "set", value, dictionary.mean.device)

    def edit(h: Tensor) -> Tensor:
        lost = 0.0 if write_back == "add" else h.float() - dictionary.decode(dictionary.encode(h))
        return (change(h) - lost).to(h.dtype)

    return edit


def mean_difference_swap(means: Tensor, source: Tensor, target: Tensor, alpha: float) -> Edit:
    """Edit h + alpha (mean of target - mean of source), class means [R, D]: the yardstick that needs no dictionary."""
    difference = alpha * (means[target] - means[source])
    return lambda h: (h.float() + difference).to(h.dtype)


def generate_edited(
    model: Any,
    tokenizer: Any,
    layer: int,
    swaps: Sequence[Swap],
    edit_for: Callable[[Tensor, Tensor], Edit],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
    progress: Callable[[int], Any] = lambda n: None,
) -> list[str]:
    """Greedy answers to the swaps' prompts under `edit_for(source [B], target [B])`, in order."""
    texts: list[str] = []
    for start in range(0, len(swaps), batch_size):
        part = swaps[start : start + batch_size]
        edit = edit_for(torch.tensor([s.source for s in part]), torch.tensor([s.target for s in part]))
        with edit_residual(model, layer, edit):
            # One batch per call: the edit is bound to these rows.
            texts += generate_answers(model, tokenizer, [s.prompt for s in part], max_new_tokens, batch_size=len(part))
        progress(len(part))
    return texts


@dataclass
class SwapScore:
    """What the model answered. kinds[i] belongs to swap i: target_answer (success), source_answer (unchanged),
    target_category (an answer of the target relation that belongs to somebody else) or other."""

    kinds: list[str]

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
    model: Any,
    tokenizer: Any,
    records: Sequence[Prompt],
    layer: int,
    edit: Edit | None = None,
    *,
    batch_size: int = 256,
    progress: Callable[[int], Any] = lambda n: None,
) -> float:
    """Mean cross-entropy (nats per token) of the answers after their prompts, with `edit` at the last prompt token.

    Prompts are batched by equal token length: then nothing is padded in front and positions need no correction.
    """
    prompts = [tokenizer(r.prompt)["input_ids"] for r in records]
    answers = [encode_answer(tokenizer, r.answer) for r in records]
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    total, tokens = 0.0, 0
    for _, same_length in groupby(order, key=lambda i: len(prompts[i])):
        group = list(same_length)
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            prompt = torch.tensor([prompts[i] for i in part], device=model.device)
            answer = pad_sequence([torch.tensor(answers[i]) for i in part], batch_first=True, padding_value=-100).to(
                model.device
            )
            with edit_residual(model, layer, edit) if edit else nullcontext():
                first = model(input_ids=prompt, use_cache=True)
                rest = model(input_ids=answer.clamp_min(0), past_key_values=first.past_key_values, use_cache=True)
            logits = torch.cat([first.logits[:, -1:], rest.logits[:, :-1]], dim=1)
            total += float(
                cross_entropy(logits.float().flatten(0, 1), answer.flatten(), ignore_index=-100, reduction="sum")
            )
            tokens += int((answer >= 0).sum())
            progress(len(part))
    return total / tokens


def loss_recovered(
    model: Any,
    tokenizer: Any,
    records: Sequence[Prompt],
    layer: int,
    dictionary: ConceptDictionary,
    progress: Callable[[int], Any] = lambda n: None,
) -> dict[str, float | None]:
    """Cross-entropy of the answers (nats per token) with h, h_hat, the mean activation and 0 at the last prompt token,
    and the shares recovered: (CE of the ablation - CE of h_hat) / (CE of the ablation - CE of h), None for x / 0.
    """
    edits: dict[str, Edit | None] = {
        "original": None,
        "reconstruction": lambda h: dictionary.decode(dictionary.encode(h)).to(h.dtype),
        "mean": lambda h: dictionary.mean.to(h.dtype).expand_as(h),
        "zero": torch.zeros_like,
    }
    loss = {
        name: answer_loss(model, tokenizer, records, layer, edit, progress=progress) for name, edit in edits.items()
    }

    def recovered(ablation: str) -> float | None:
        harm = loss[ablation] - loss["original"]
        return (loss[ablation] - loss["reconstruction"]) / harm if harm else None

    return {
        **{f"cross_entropy_{name}": value for name, value in loss.items()},
        "recovered_over_mean": recovered("mean"),
        "recovered_over_zero": recovered("zero"),
    }
