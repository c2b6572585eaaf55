"""Which prompts are swapped: some to choose the strength on, others to report."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from trainer.analysis.interventions import Swap, swap_pairs
from trainer.analysis.side_effects import other_questions
from trainer.errors import UserError
from trainer.language_model import Match, Prompt

LEARNING = 4096  # swaps at most that a method learns from


@dataclass(frozen=True)
class Drawn:
    """Swaps, and for each that has one an other question about its subject, of the same prompts and under the same edit
    (`other_questions`)."""

    swaps: list[Swap]
    others: list[Swap]


@dataclass(frozen=True)
class Choice:
    """validation: what strengths are chosen on; on: what tells it from what is `reported`; learning: for methods that
    learn through the model, of the training prompts where there are validation prompts, else of the same prompts as
    validation, other swaps where there are others."""

    validation: Drawn
    reported: Drawn
    learning: Drawn
    on: str


def choose_swaps(args: argparse.Namespace, records: Sequence[Prompt], concepts: Sequence[str], match: Match) -> Choice:
    """UserError where there are no two sets of prompts."""

    def pairs(chosen: Sequence[Prompt], split: str | None, most: int = args.pairs) -> list[Swap]:
        return swap_pairs(chosen, concepts, split=split, pairs=most, seed=args.seed, match=match)

    def drawn(swaps: list[Swap], records: Sequence[Prompt], split: str | None) -> Drawn:
        questions = [r for r in records if split is None or r.split == split]
        return Drawn(swaps, other_questions(questions, concepts, swaps, args.seed))

    def choice(
        first: Sequence[Prompt],
        second: Sequence[Prompt],
        splits: tuple[str | None, str | None],
        on: str,
        learn: str = "",
    ) -> Choice:
        taught = learn or splits[0]
        validation = pairs(first, splits[0], -(-args.pairs // 2))
        learning = pairs(first, taught, LEARNING)
        asked = {(s.prompt, s.target) for s in validation}
        fresh = [s for s in learning if (s.prompt, s.target) not in asked]
        return Choice(
            drawn(validation, first, splits[0]),
            drawn(pairs(second, splits[1]), second, splits[1]),
            drawn(fresh or learning, first, taught),
            on,
        )

    split = None if args.split == "all" else args.split
    if split == "heldout" and any(r.split == "validation" and r.subject for r in records):
        return choice(records, records, ("validation", split), "validation prompts", learn="train")
    if split == "heldout" and any(r.split == "train" and r.subject for r in records):
        with suppress(UserError):
            return choice(records, records, ("train", split), "training templates")
    pairs(records, split)  # says what is wrong with the prompts themselves
    subjects = sorted({r.subject for r in records if r.subject and (split is None or r.split == split)})
    order = np.random.default_rng(args.seed).permutation(len(subjects))
    halves = [{subjects[i] for i in part} for part in np.array_split(order, 2)]
    first, second = ([r for r in records if r.subject in half] for half in halves)
    try:
        return choice(first, second, (split, split), "other subjects")
    except UserError as error:
        raise UserError(
            f"{args.prompts}: alpha needs other prompts than those that are reported: give prompts of split train "
            f"beside the held-out ones, or more subjects ({error})"
        ) from error
