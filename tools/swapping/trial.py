"""Trying a method: its strength on some swaps, then what it does to others and to what it should leave alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.swapping.choice import Choice
from tools.swapping.figures import ahead, curve, form, outcome, strength
from trainer.analysis.interventions import EditFor, Swap, SwapScore, generate_edited, score_swaps
from trainer.analysis.rivals import Method
from trainer.analysis.side_effects import Bystanders, Harm
from trainer.language_model import EditableModel, Match


@dataclass(frozen=True)
class Trial:
    """What all methods are tried on.

    answers: all answers of each concept; unedited: how the reported swaps end without an edit; ends: activations [n, D]
    at their prompts' last tokens; longest: tokens of an answer. progress is told of swaps.
    """

    editable: EditableModel
    choice: Choice
    concepts: Sequence[str]
    answers: Sequence[frozenset[str]]
    unedited: SwapScore
    ends: Tensor
    bystanders: Bystanders
    match: Match
    longest: int
    progress: Callable[[int], Any]

    def answers_under(self, swaps: Sequence[Swap], edit_for: EditFor) -> list[str]:
        """What the model answers to the swaps' prompts."""
        return generate_edited(self.editable, swaps, edit_for, self.longest, self.progress)

    def score(self, swaps: Sequence[Swap], edit_for: EditFor) -> tuple[SwapScore, list[str]]:
        """How swaps end, and the texts."""
        texts = self.answers_under(swaps, edit_for)
        return score_swaps(swaps, texts, self.answers, self.match), texts

    @property
    def known(self) -> list[Swap]:
        """One swap of each reported prompt that is answered right without an edit."""
        right = zip(self.choice.reported.swaps, self.unedited.kinds, strict=True)
        return [*{s.prompt: s for s, kind in right if kind == "source_answer"}.values()]

    def swaps(self, alphas: int) -> int:
        """How many swaps `measured` makes with a method."""
        return alphas * len(self.choice.validation.swaps) + len(self.choice.reported.swaps) + len(self.known)


@dataclass(frozen=True)
class Measured:
    """part: of swap.json. always, when: scores of the two forms and their side effects."""

    part: dict[str, Any]
    always: tuple[SwapScore, Harm]
    when: tuple[SwapScore, Harm]


def lead(swaps: Sequence[Swap], first: Measured, second: Measured) -> dict[str, Any]:
    """How far the first is above the second on the same swaps, in both forms."""
    return {
        "always": ahead(swaps, first.always, second.always),
        "when": ahead(swaps, first.when, second.when),
    }


def measured(trial: Trial, method: Method, alphas: Sequence[float]) -> Measured:
    """The strength that the validation swaps choose, and what the method does then.

    A prompt is edited at its last token alone: where the method does not read the source there, the conditional form
    ends as without an edit.
    """

    def swap_with(alpha: float) -> EditFor:
        return lambda source, target: method.swap(source, target, alpha)

    swaps, validation = trial.choice.reported.swaps, trial.choice.validation.swaps
    tried = {alpha: trial.score(validation, swap_with(alpha))[0] for alpha in alphas}
    best = strength(tried, validation)
    score, texts = trial.score(swaps, swap_with(best))
    read = method.reads(trial.ends).cpu() == torch.tensor([s.source for s in swaps])
    harm, harm_when = trial.bystanders.harms(method, best)
    found = {"always": (score, harm), "when": (score.where(read, trial.unedited), harm_when)}
    forms = {which: form(swaps, *found[which]) for which in found}
    part = {
        "best_alpha": best,
        "best_success": forms["always"]["success"],
        "standard_error": forms["always"]["standard_error"],
        "alphas": curve(tried),
        **outcome(swaps, score, texts, trial.concepts),
        "forms": forms,
        "suppression": suppression(trial, method),
    }
    return Measured(part, found["always"], found["when"])


def suppression(trial: Trial, method: Method) -> dict[str, Any]:
    """Share of the prompts that were answered right and no longer are when their concept is suppressed; and of other
    questions about the subject that still are, under the same edit."""
    known = trial.known
    texts = trial.answers_under(known, lambda source, target: method.suppress(source))
    gone = [not trial.match(text, s.source_answer) for text, s in zip(texts, known, strict=True)]
    kept = trial.bystanders.kept(lambda source, target: method.suppress(source))
    return {
        "prompts": len(gone),
        "success": sum(gone) / len(gone) if gone else None,
        "isolation": sum(kept) / len(kept) if kept else None,
    }
