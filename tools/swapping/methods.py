"""The methods that are compared, by name."""

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from tqdm import tqdm

from tools.swapping.choice import Choice
from trainer.analysis.rivals import (
    Alignment,
    Erasure,
    Learning,
    Lesson,
    MeanDifference,
    Method,
    Slots,
    TrainingRows,
    best_slots,
    fit_probe,
    learn_basis,
    learn_rows,
    lesson_loss,
    slot_means,
)
from trainer.checkpoint import load_dictionary
from trainer.dictionary import ConceptDictionary
from trainer.errors import UserError
from trainer.language_model import EditableModel
from trainer.stream import Manifest

OURS, YARDSTICK, LEARNED = "slots", "mean_difference", "slots_learned"
_DAS = re.compile(r"das(?:_(\d+))?\Z")


def dimensions(name: str, concepts: int) -> int | None:
    """k of a rival that is called das or das_K; None for another name."""
    found = _DAS.match(name)
    return None if found is None else int(found[1] or concepts)


def other_runs(
    args: argparse.Namespace, dictionary: ConceptDictionary, trained_on: Manifest
) -> dict[str, ConceptDictionary]:
    """The dictionaries of --unsupervised and --beside by name. UserError for one that cannot stand beside this one."""
    runs = [("unsupervised", args.unsupervised)] if args.unsupervised else []
    taken = {OURS, YARDSTICK, "unsupervised", *args.rivals}
    found: dict[str, ConceptDictionary] = {}
    for name, run in [*runs, *args.beside]:
        if (name, run) not in runs and (name in taken or name in found):
            raise UserError(f"--beside {name}={run}: there is a method called {name} already")
        other, manifest = load_dictionary(run)
        if (other.width, manifest.hook_point) != (dictionary.width, trained_on.hook_point):
            raise UserError(
                f"{run} reads {manifest.hook_point} of width {other.width}, {args.run_dir} reads "
                f"{trained_on.hook_point} of width {dictionary.width}; they cannot be compared"
            )
        if name != "unsupervised" and (missing := {*dictionary.concept_names} - {*other.concept_names}):
            raise UserError(f"{run} has no slots for {', '.join(sorted(missing))}")
        found[name] = other.to(args.device)
    return found


def build(
    args: argparse.Namespace,
    dictionary: ConceptDictionary,
    rows: TrainingRows,
    others: dict[str, ConceptDictionary],
    editable: EditableModel,
    choice: Choice,
    texts: Sequence[Tensor | None],
) -> tuple[dict[str, Method], dict[str, float]]:
    """All methods, fitted on the training rows, or on swaps of them through the model: name -> method; and the rates
    that those learned at, of --learn-rates the one with the smallest loss on what strengths are chosen on.

    texts: windows [W, T] of ordinary text to learn with and to choose on, or None twice. UserError for a subspace wider
    than the rows.
    """
    rates: dict[str, float] = {}
    lesson, chosen_on = (
        Lesson(drawn.swaps, drawn.others, windows)
        for drawn, windows in zip((choice.learning, choice.validation), texts, strict=True)
    )

    def learned(name: str, make: Callable[[Learning], Method]) -> Method:
        tried = []
        with tqdm(total=len(args.learn_rates) * args.learn_steps, desc=name, unit="step") as bar:
            for rate in args.learn_rates:
                how = Learning(steps=args.learn_steps, rate=rate, seed=args.seed, progress=bar.update)
                method = make(how)
                loss = lesson_loss(editable, chosen_on, method) if len(args.learn_rates) > 1 else 0.0
                tried.append((loss, rate, method))
        _, rates[name], best = min(tried, key=lambda one: one[0])
        return best

    def slots_of(of: ConceptDictionary, slots: Sequence[int], *, relative: bool = False) -> Slots:
        return Slots(of, slots, slot_means(of, rows, slots), args.mode, relative=relative)

    def subspace(size: int, how: Learning) -> Method:
        return Alignment(rows, learn_basis(editable, lesson, rows, size, how))

    ours = slots_of(dictionary, range(len(dictionary.concept_names)))
    methods: dict[str, Method] = {OURS: ours, YARDSTICK: MeanDifference(rows)}
    for name in args.rivals:
        size = dimensions(name, len(dictionary.concept_names))
        if name == "probe":
            methods[name] = fit_probe(rows, args.seed)
        elif name == "erasure":
            methods[name] = Erasure(rows)
        elif size is None:
            methods[name] = learned(name, lambda how: ours.writing(learn_rows(editable, lesson, ours, how)))
        elif size > rows.acts.shape[1]:
            raise UserError(f"--rivals das_{size}: the activations have {rows.acts.shape[1]} dimensions")
        else:
            methods[f"das_{size}"] = learned(f"das_{size}", partial(subspace, size))
    for name, other in others.items():
        if name == "unsupervised":
            methods[name] = slots_of(other, best_slots(other, rows), relative=True)
        else:
            methods[name] = slots_of(other, [other.concept_names.index(c) for c in dictionary.concept_names])
    return methods, rates
