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
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from trainer.dictionary import ConceptDictionary
from trainer.errors import UserError
from trainer.language_model import (
    Edit,
    Match,
    Prompt,
    Tokens,
    answer_matches,
    capture,
    edit_residual,
    edit_tokens,
    encode_answer,
    encode_prompts,
    generate_answers,
    last_token,
)

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
    model: Any,
    tokenizer: Any,
    layer: int,
    swaps: Sequence[Swap],
    edit_for: EditFor,
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


@torch.no_grad()
def prompt_ends(model: Any, tokenizer: Any, layer: int, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Activations [n, D] after block `layer` at the last token of each prompt: what an edit of a swap is given."""
    found = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = (t.to(model.device) for t in encode_prompts(tokenizer, prompts[start : start + batch_size]))
        h = capture(model, ids, mask, [layer])[layer]
        found.append(h[torch.arange(len(h), device=h.device), last_token(mask)])
    return torch.cat(found)


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


def answer_cross_entropy(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], layer: int, edit: Edit | None = None
) -> tuple[Tensor, int]:
    """Sum of the cross-entropy (nats, fp32) of the answers after their prompts, with `edit` at the last prompt token,
    and the number of their tokens. Differentiable in what the edit computes.

    One pass over prompts and answers, padded behind them: then positions need no correction.
    """
    before = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    after = [encode_answer(tokenizer, answer) for answer in answers]
    ids = [torch.tensor(b + a) for b, a in zip(before, after, strict=True)]
    told = [torch.tensor([-100] * len(b) + a) for b, a in zip(before, after, strict=True)]
    end = torch.tensor([len(b) - 1 for b in before], device=model.device)

    def at_prompt_end(h: Tensor, tokens: Tokens) -> Tensor:
        if edit is None:
            return h
        row, edited = torch.arange(len(h), device=h.device), h.clone()
        edited[row, end] = edit(h[row, end]).to(h.dtype)
        return edited

    with edit_tokens(model, layer, at_prompt_end):
        logits = model(input_ids=pad_sequence(ids, batch_first=True).to(model.device), use_cache=False).logits
    told_next = pad_sequence(told, batch_first=True, padding_value=-100)[:, 1:].to(model.device)
    total = cross_entropy(logits[:, :-1].float().flatten(0, 1), told_next.flatten(), ignore_index=-100, reduction="sum")
    return total, sum(map(len, after))


@torch.no_grad()
def answer_loss(
    model: Any,
    tokenizer: Any,
    records: Sequence[Prompt],
    layer: int,
    edit: Edit | None = None,
    *,
    batch_size: int = 64,
    progress: Callable[[int], Any] = lambda n: None,
) -> float:
    """Mean cross-entropy (nats per token) of the answers after their prompts, with `edit` at the last prompt token."""
    order = sorted(records, key=lambda r: len(r.prompt))  # little padding
    total, tokens = 0.0, 0
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        prompts, answers = [r.prompt for r in part], [r.answer for r in part]
        found, count = answer_cross_entropy(model, tokenizer, prompts, answers, layer, edit)
        total, tokens = total + float(found), tokens + count
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
    return shares_recovered(
        {
            name: answer_loss(model, tokenizer, records, layer, edit, progress=progress)
            for name, edit in ablations(dictionary).items()
        }
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
