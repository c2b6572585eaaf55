"""What a swap leaves alone: other questions about its subject, the distributions of next tokens, the flow of text.

Everything is compared with the same model without an edit. The edit is that of a swap from one concept to another; a
prompt is edited at its last token, as in a swap, text at every token.

Shapes: B sequences, T tokens, V vocabulary, D width at the hook point.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from statistics import harmonic_mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.analysis.interventions import EditFor, Swap, generate_edited
from trainer.analysis.movement import every_token, prompts_moved, text_moved
from trainer.analysis.rivals import Method, when_read
from trainer.errors import UserError
from trainer.language_model import Edit, EditableModel, Match, Prompt


def other_questions(records: Sequence[Prompt], concepts: Sequence[str], swaps: Sequence[Swap], seed: int) -> list[Swap]:
    """For each swap a prompt of `records` that asks something else about its subject, under the same edit.

    source_answer is the answer to that prompt, which asks neither for the source nor for the target. A swap whose
    subject has no such prompt is passed over.
    """
    slot = {name: index for index, name in enumerate(concepts)}
    of: dict[str, list[Prompt]] = {}
    for record in records:
        if record.concept in slot and record.subject and record.answer:
            of.setdefault(record.subject, []).append(record)
    rng = np.random.default_rng(seed)
    found = []
    for swap in swaps:
        others = [r for r in of.get(swap.subject, []) if slot[r.concept] not in (swap.source, swap.target)]
        if others:
            other = others[rng.integers(len(others))]
            found.append(replace(swap, prompt=other.prompt, source_answer=other.answer))
    return found


def beginnings(tokenizer: Any, texts: Sequence[str], windows: int, length: int) -> Tensor:
    """The first `length` token ids of as many texts, [at most `windows`, length]. UserError where none is as long."""
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts)
    whole = [ids for ids in encoded if len(ids) == length][:windows]
    if not whole:
        raise UserError(f"no text has {length} tokens; what an edit does to ordinary text needs longer ones")
    return torch.tensor(whole)


@dataclass(frozen=True)
class Harm:
    """What an edit did.

    subjects, kept, moved: of each other question that the unedited model answers right, its subject, whether the answer
    still is right, and the KL divergence (nats) of the distributions of the next token without and with the edit.
    text_kl: mean of that divergence over the tokens of ordinary text. text_nats: how much more cross-entropy per token
    the unedited model has with continuations that were generated under the edit than with its own. None without text.
    """

    subjects: list[str]
    kept: list[bool]
    moved: list[float]
    text_kl: float | None
    text_nats: float | None

    def where(self, applied: Tensor, text_kl: float | None, text_nats: float | None) -> "Harm":
        """The same edit at the questions that are `applied` [n] bool alone, and what it then does to text."""
        kept = [still or not edited for still, edited in zip(self.kept, applied.tolist(), strict=True)]
        moved = [kl * edited for kl, edited in zip(self.moved, applied.tolist(), strict=True)]
        return Harm(self.subjects, kept, moved, text_kl, text_nats)

    @property
    def isolation(self) -> float | None:
        """Share of the other questions that are still answered right; None without any."""
        return sum(self.kept) / len(self.kept) if self.kept else None

    @property
    def prompt_kl(self) -> float | None:
        """Mean divergence at other questions; None without any."""
        return sum(self.moved) / len(self.moved) if self.moved else None

    @property
    def fluency(self) -> float | None:
        """Perplexity of unedited continuations over that of edited ones, at most 1; None without text."""
        return None if self.text_nats is None else math.exp(-max(self.text_nats, 0.0))

    @property
    def quiet(self) -> float | None:
        """Side effects as a share of [0, 1], 1 where there are none: the mean, over what was measured, of exp(-KL at
        other questions), exp(-KL on text) and the fluency."""
        kept = [math.exp(-kl) for kl in (self.prompt_kl, self.text_kl) if kl is not None]
        kept += [self.fluency] if self.fluency is not None else []
        return sum(kept) / len(kept) if kept else None


def joint_score(success: float, isolation: float | None, quiet: float | None) -> float:
    """Harmonic mean of success, isolation and quiet side effects, over those that were measured."""
    return harmonic_mean([success, *(value for value in (isolation, quiet) if value is not None)])


def joint_without(success: Sequence[float], subjects: Sequence[str], harm: Harm) -> dict[str, float]:
    """The joint score without each of the subjects, of success[i] with subjects[i]; for `statistics.jackknife_error`.

    What happens to text belongs to no subject and stays.
    """
    gained, kept, moved = (np.array(values, dtype=float) for values in (success, harm.kept, harm.moved))
    own, asked = np.array(subjects), np.array(harm.subjects)
    found = {}
    for subject in sorted({*subjects}) if len({*subjects}) > 1 else []:
        rest = replace(harm, kept=kept[asked != subject].tolist(), moved=moved[asked != subject].tolist())
        found[subject] = joint_score(float(gained[own != subject].mean()), rest.isolation, rest.quiet)
    return found


class Bystanders:
    """Prompts and text that an edit should leave alone.

    Args:
        others: see `other_questions`.
        windows: token ids [W, T] of ordinary text, where the model is, or None.
        match: when a generated text counts as an answer.
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        editable: EditableModel,
        others: Sequence[Swap],
        windows: Tensor | None,
        *,
        match: Match,
        max_new_tokens: int,
    ):
        self._editable, self._match, self._new = editable, match, max_new_tokens
        self._model, self._tokenizer = editable.model, editable.tokenizer
        asked = [*dict.fromkeys(s.prompt for s in others)]
        said = dict(zip(asked, editable.answers(asked, max_new_tokens), strict=True))
        self.others = [s for s in others if match(said[s.prompt], s.source_answer)]
        prompts = [s.prompt for s in self.others]
        self._ends = editable.ends(prompts) if prompts else None
        self._windows = windows
        self._swaps = others  # spread evenly over sources and targets, so over windows too
        self._own_nats = None if windows is None or not others else self._continued(lambda s, t: lambda h: h)

    def kept(self, edit_for: EditFor) -> list[bool]:
        """Whether each of `others` is still answered right under an edit."""
        texts = generate_edited(self._editable, self.others, edit_for, self._new)
        return [self._match(text, s.source_answer) for text, s in zip(texts, self.others, strict=True)]

    def text_harm(self, edit_for: EditFor) -> tuple[float | None, float | None]:
        """`text_kl` and `text_nats` of Harm."""
        if self._own_nats is None:
            return None, None
        return self._text_moved(edit_for), self._continued(edit_for) - self._own_nats

    def harm(self, edit_for: EditFor) -> Harm:
        """What an edit of these prompts and texts does."""
        kept = self.kept(edit_for)
        moved: list[float] = []
        with torch.no_grad():
            for part in self._editable.batches(self.others):
                moved += prompts_moved(self._editable, part, edit_for).tolist()
        return Harm([s.subject for s in self.others], kept, moved, *self.text_harm(edit_for))

    def harms(self, method: Method, strength: float) -> tuple[Harm, Harm]:
        """What the swap of a method does always, and where the method reads the source.

        A question is edited at one token. Where the source is not read there, it stays as it was, so the second needs
        no further answers; text is edited at every token, and what is read at one depends on the edits before it.
        """
        always = self.harm(lambda source, target: method.swap(source, target, strength))
        sources = torch.tensor([s.source for s in self.others])
        read = sources == (sources if self._ends is None else method.reads(self._ends).cpu())

        def where_read(source: Tensor, target: Tensor) -> Edit:
            return when_read(method, source, method.swap(source, target, strength))

        return always, always.where(read, *self.text_harm(where_read))

    def _parts(self) -> Iterator[tuple[Tensor, list[Swap]]]:
        """Some windows, and the swap that each is edited with."""
        assert self._windows is not None
        step = max(1, self._editable.batch_size // 8)  # logits of all tokens are held, and an answer has a few
        swaps = cycle(self._swaps)
        for part in self._windows.split(step):
            yield part, [*islice(swaps, len(part))]

    @torch.no_grad()
    def _text_moved(self, edit_for: EditFor) -> float:
        total, tokens = 0.0, 0
        for ids, swaps in self._parts():
            moved = text_moved(self._editable, ids, swaps, edit_for)
            total, tokens = total + float(moved.sum()), tokens + moved.numel()
        return total / tokens

    @torch.no_grad()
    def _continued(self, edit_for: EditFor) -> float:
        """Cross-entropy per token (nats) that the unedited model has with greedy continuations of the windows' first
        halves, which were generated under the edit."""
        total, tokens = 0.0, 0
        end, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        for whole, swaps in self._parts():
            ids = whole[:, : max(1, whole.shape[1] // 2)]
            with every_token(self._editable, swaps, edit_for):
                out = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=whole.shape[1] - ids.shape[1],
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=pad,
                )
            new = out[:, ids.shape[1] :]
            ends = new == end if end is not None else torch.zeros_like(new, dtype=torch.bool)
            told = new.masked_fill(ends.cumsum(dim=1) - ends.long() > 0, -100)  # the first end token still counts
            logits = self._model(input_ids=out, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
            total += float(cross_entropy(logits.float().flatten(0, 1), told.flatten(), reduction="sum"))
            tokens += int((told >= 0).sum())
        return total / tokens
