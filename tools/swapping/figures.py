"""What each method did, as the values of swap.json."""

from collections.abc import Sequence
from typing import Any

import torch

from trainer.analysis.interventions import Swap, SwapScore
from trainer.analysis.side_effects import Harm, joint_score, joint_without
from trainer.analysis.statistics import jackknife_error, mean_by_subject

EXAMPLES = 20  # of each kind of failure


def successes(score: SwapScore) -> list[float]:
    """1 for each swap that succeeded, else 0."""
    return [float(kind == "target_answer") for kind in score.kinds]


def strength(scores: dict[float, SwapScore], swaps: Sequence[Swap]) -> float:
    """The smallest strength whose success is within one standard error, over subjects, of the largest success.

    What lies within the error is not known to be better, and a larger strength does more to everything else. (The rule
    of one standard error by which Breiman et al. 1984 choose the size of a tree.)
    """
    subjects = [s.subject for s in swaps]
    best, error = max(
        (mean_by_subject(successes(score), subjects) for score in scores.values()), key=lambda found: found[0]
    )
    return min(alpha for alpha, score in scores.items() if score.success >= best - (error or 0.0) - 1e-9)


def curve(scores: dict[float, SwapScore]) -> list[dict[str, Any]]:
    """One row per strength."""
    return [
        {
            "alpha": alpha,
            "success": score.success,
            "category_kept": score.category_kept,
            "category_kept_of_failures": score.category_kept_of_failures,
            "unchanged": score.share("source_answer"),
        }
        for alpha, score in scores.items()
    ]


def outcome(swaps: Sequence[Swap], score: SwapScore, texts: Sequence[str], concepts: Sequence[str]) -> dict[str, Any]:
    """Matrix [source][target] of swaps and successes, failures by kind with examples."""
    count = torch.zeros(len(concepts), len(concepts), dtype=torch.int64)
    success = torch.zeros_like(count)
    examples: dict[str, list[dict[str, str]]] = {}
    for swap, kind, text in zip(swaps, score.kinds, texts, strict=True):
        count[swap.source, swap.target] += 1
        if kind == "target_answer":
            success[swap.source, swap.target] += 1
        elif len(examples.setdefault(kind, [])) < EXAMPLES:
            examples[kind].append(
                {
                    "prompt": swap.prompt,
                    "source": concepts[swap.source],
                    "target": concepts[swap.target],
                    "expected": swap.target_answer,
                    "answered": text,
                }
            )
    return {
        "category_kept": score.category_kept,
        "matrix": {"swaps": count.tolist(), "successes": success.tolist()},
        "failures": {
            kind: {"count": score.kinds.count(kind), "examples": examples.get(kind, [])}
            for kind in ("source_answer", "target_category", "other")
        },
    }


def form(swaps: Sequence[Swap], score: SwapScore, harm: Harm) -> dict[str, Any]:
    """Success and side effects of one form of a method (trainer.analysis.side_effects says what they are)."""
    subjects = [s.subject for s in swaps]
    success, error = mean_by_subject(successes(score), subjects)
    without = joint_without(successes(score), subjects, harm)
    return {
        "success": success,
        "standard_error": error,
        "isolation": harm.isolation,
        "prompt_kl": harm.prompt_kl,
        "text_kl": harm.text_kl,
        "fluency": harm.fluency,
        "quiet": harm.quiet,
        "joint": joint_score(success, harm.isolation, harm.quiet),
        "joint_standard_error": jackknife_error([*without.values()]),
    }


def ahead(
    swaps: Sequence[Swap], ours: tuple[SwapScore, Harm], other: tuple[SwapScore, Harm]
) -> dict[str, dict[str, float | None]]:
    """How far the first is above the second on the same swaps, in success and in the joint score."""
    subjects = [s.subject for s in swaps]
    pairs = [(successes(score), harm) for score, harm in (ours, other)]
    gain, error = mean_by_subject([a - b for a, b in zip(pairs[0][0], pairs[1][0], strict=True)], subjects)
    first, second = (joint_without(success, subjects, harm) for success, harm in pairs)
    joints = [joint_score(score.success, harm.isolation, harm.quiet) for score, harm in (ours, other)]
    return {
        "success": {"difference": gain, "standard_error": error},
        "joint": {
            "difference": joints[0] - joints[1],
            "standard_error": jackknife_error([first[subject] - second[subject] for subject in first]),
        },
    }
