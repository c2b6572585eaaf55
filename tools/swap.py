"""Swap one concept for another in a running language model -> RUN/swap.json

  alignsae swap --run runs/demo --model models/demo --prompts data/demo/questions.jsonl

At the last prompt token the slot of the asked relation is set to 0 and the slot of another relation to alpha times its
mean activation on its own concept (training shards); the model then answers greedily. A swap succeeds when the answer
is the other relation's answer for the same subject: the whole of it, or as --match says (`alignsae ask` suggests a
rule, and keeps the prompts that the model answers at all). Beside it stands the yardstick that needs no dictionary:
h + alpha * (mean of the target relation - mean of the asked relation).

Alpha is chosen on other prompts than those that are reported: on the training templates where --split is heldout and
there are any, else on one half of the subjects, while the other half is reported. Standard errors are over subjects.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trainer.analysis.evaluation import concept_means, concept_slot_means
from trainer.analysis.interventions import (
    Edit,
    Swap,
    SwapScore,
    answer_sets,
    generate_edited,
    mean_difference_swap,
    score_swaps,
    slot_swap,
    swap_pairs,
)
from trainer.analysis.language_model import (
    RULES,
    Match,
    Prompt,
    encode_answer,
    generate_answers,
    hook_layer,
    load_language_model,
    matcher,
    read_prompts,
)
from trainer.analysis.results import rows_of, run_shards
from trainer.analysis.statistics import mean_by_subject
from trainer.checkpoint import load_dictionary
from trainer.errors import UserError
from trainer.files import write_result
from trainer.run_folder import RunFolder

EXAMPLES = 20  # of each kind of failure
KNOWS_LITTLE = 0.1  # accuracy of the unedited model below which swaps mean little
Attempt = tuple[SwapScore, list[str]]  # with the texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae swap`."""
    parser.add_argument(
        "--run", dest="run_dir", type=Path, required=True, help="run folder (its newest checkpoint is read)"
    )
    parser.add_argument("--model", required=True, help="the language model that the activations came from")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSONL with prompt, answer, concept, subject, split"
    )
    parser.add_argument("--train", help="shards for the means (default: the shards in RUN/config.yaml)")
    parser.add_argument(
        "--alphas",
        type=_alphas,
        default=[0.5, 1.0, 1.5, 2.0, 3.0, 5.0],
        help="comma-separated strengths (default: 0.5,1,1.5,2,3,5)",
    )
    parser.add_argument("--pairs", type=int, default=600, help="swaps per strength (default: 600)")
    parser.add_argument(
        "--mode",
        choices=("add", "replace"),
        default="add",
        help="write back h + decode(z') - decode(z), or decode(z') (default: add)",
    )
    parser.add_argument(
        "--split", choices=("heldout", "train", "all"), default="heldout", help="prompts to swap (default: heldout)"
    )
    parser.add_argument(
        "--match",
        choices=RULES,
        default="exact",
        help=f"{'; '.join(f'{name}: {what}' for name, what in RULES.items())} (default: exact)",
    )
    parser.add_argument("--seed", type=int, default=0, help="which prompts are drawn (default: 0)")
    parser.add_argument("--batch-size", type=int, default=256, help="prompts per forward pass (default: 256)")
    parser.add_argument("--device", default="cpu", help="device of model and dictionary (default: cpu)")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN/swap.json)")


def _alphas(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> None:
    """Swap, score and write the JSON file."""
    if args.pairs < 1 or args.batch_size < 1:
        raise UserError("--pairs and --batch-size must be at least 1")
    dictionary, trained_on = load_dictionary(args.run_dir)
    dictionary.to(args.device)
    concepts = dictionary.concept_names
    if len(concepts) < 2:
        raise UserError(f"{args.run_dir} has {len(concepts)} concept slots; a swap needs two")
    layer = hook_layer(trained_on.hook_point)
    records = read_prompts(args.prompts)
    rows, _ = rows_of([args.train] if args.train else run_shards(args.run_dir), dictionary)
    slot_means, class_means = concept_slot_means(dictionary, rows), concept_means(rows, len(concepts))
    model, tokenizer = load_language_model(args.model, args.device)
    match = matcher(args.match, tokenizer)
    validation, swaps, validated_on = choose_swaps(args, records, concepts, match)
    answers = answer_sets(records, concepts)
    longest = max(len(encode_answer(tokenizer, a)) for a in frozenset().union(*answers))
    prompts = sorted({(s.prompt, s.source_answer) for s in swaps})
    unedited = generate_answers(model, tokenizer, [p for p, _ in prompts], longest, args.batch_size)
    accuracy = sum(match(t, a) for t, (_, a) in zip(unedited, prompts, strict=True)) / len(prompts)
    if accuracy < KNOWS_LITTLE:
        warn_of_unknown(args, accuracy, len(prompts))
    methods: dict[str, Callable[[float], Callable[[Tensor, Tensor], Edit]]] = {
        "slots": lambda alpha: partial(slot_swap, dictionary, strength=alpha * slot_means, write_back=args.mode),
        "mean_difference": lambda alpha: partial(mean_difference_swap, class_means, alpha=alpha),
    }
    total = 2 * (len(args.alphas) * len(validation) + len(swaps))
    with tqdm(total=total, desc="swaps", unit="swap") as bar:

        def attempt(tried: list[Swap], edit_for: Callable[[Tensor, Tensor], Edit]) -> Attempt:
            texts = generate_edited(
                model,
                tokenizer,
                layer,
                tried,
                edit_for,
                max_new_tokens=longest,
                batch_size=args.batch_size,
                progress=bar.update,
            )
            return score_swaps(tried, texts, answers, match), texts

        summaries, kinds = {}, {}
        for name, method in methods.items():
            curve = [(alpha, attempt(validation, method(alpha))[0]) for alpha in args.alphas]
            best_alpha, _ = max(curve, key=lambda entry: (entry[1].success, -entry[0]))
            found = attempt(swaps, method(best_alpha))
            summaries[name], kinds[name] = _summarise(swaps, best_alpha, found, curve, concepts), found[0].kinds
    gain = [
        (ours == "target_answer") - (other == "target_answer")
        for ours, other in zip(kinds["slots"], kinds["mean_difference"], strict=True)
    ]
    difference, error = mean_by_subject(gain, [s.subject for s in swaps])
    result = {
        "run": str(args.run_dir),
        "model": str(args.model),
        "layer": layer,
        "mode": args.mode,
        "split": args.split,
        "match": args.match,
        "pairs": len(swaps),
        "seed": args.seed,
        "concepts": concepts,
        "unedited_accuracy": accuracy,
        "validation": {"on": validated_on, "pairs": len(validation)},
        **summaries,
        "slots_over_mean_difference": {"difference": difference, "standard_error": error},
    }
    out = args.out or RunFolder(args.run_dir).swap
    write_result(out, result)
    _show(result)
    print(f"written: {out}")


def choose_swaps(
    args: argparse.Namespace, records: Sequence[Prompt], concepts: Sequence[str], match: Match
) -> tuple[list[Swap], list[Swap], str]:
    """Swaps that alpha is chosen on, swaps that are reported, and what tells them apart. UserError without two sets."""

    def pairs(chosen: Sequence[Prompt], split: str | None) -> list[Swap]:
        return swap_pairs(chosen, concepts, split=split, pairs=args.pairs, seed=args.seed, match=match)

    split = None if args.split == "all" else args.split
    if split == "heldout" and any(r.split == "train" and r.subject for r in records):
        with suppress(UserError):
            return pairs(records, "train"), pairs(records, split), "training templates"
    pairs(records, split)  # says what is wrong with the prompts themselves
    subjects = sorted({r.subject for r in records if r.subject and (split is None or r.split == split)})
    order = np.random.default_rng(args.seed).permutation(len(subjects))
    halves = [{subjects[i] for i in part} for part in np.array_split(order, 2)]
    try:
        first, second = (pairs([r for r in records if r.subject in half], split) for half in halves)
    except UserError as error:
        raise UserError(
            f"{args.prompts}: alpha needs other prompts than those that are reported: give prompts of split train "
            f"beside the held-out ones, or more subjects ({error})"
        ) from error
    return first, second, "other subjects"


def warn_of_unknown(args: argparse.Namespace, accuracy: float, prompts: int) -> None:
    """Say loudly that the figures that follow mean little."""
    rule = f"--match {args.match}" + (" or --match prefix" if args.match == "exact" else "")
    print(
        f"alignsae: warning: without an edit the model answers {accuracy:.1%} of the {prompts} prompts ({rule}?): "
        "swaps of facts that it does not know measure nothing. `alignsae ask` with this model and these prompts keeps "
        "what it knows (--out known.jsonl) and suggests the rule",
        file=sys.stderr,
    )


def _summarise(
    swaps: Sequence[Swap],
    best_alpha: float,
    found: Attempt,
    curve: list[tuple[float, SwapScore]],
    concepts: Sequence[str],
) -> dict[str, Any]:
    """Success at the alpha that was chosen with matrix [source][target], failures and examples; the curve over alpha is
    that of the validation."""
    best, texts = found
    _, error = mean_by_subject([float(kind == "target_answer") for kind in best.kinds], [s.subject for s in swaps])
    count = torch.zeros(len(concepts), len(concepts), dtype=torch.int64)
    success = torch.zeros_like(count)
    examples: dict[str, list[dict[str, str]]] = {}
    for swap, kind, text in zip(swaps, best.kinds, texts, strict=True):
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
        "best_alpha": best_alpha,
        "best_success": best.success,
        "standard_error": error,
        "category_kept": best.category_kept,
        "alphas": [
            {
                "alpha": alpha,
                "success": score.success,
                "category_kept": score.category_kept,
                "category_kept_of_failures": score.category_kept_of_failures,
                "unchanged": score.share("source_answer"),
            }
            for alpha, score in curve
        ],
        "matrix": {"swaps": count.tolist(), "successes": success.tolist()},
        "failures": {
            kind: {"count": best.kinds.count(kind), "examples": examples.get(kind, [])}
            for kind in ("source_answer", "target_category", "other")
        },
    }


def _show(result: dict[str, Any]) -> None:
    print(
        f"{result['pairs']} swaps ({result['split']} prompts), layer {result['layer']}, "
        f"unedited accuracy {result['unedited_accuracy']:.4f} (match: {result['match']})"
    )
    print(f"alpha on {result['validation']['pairs']} swaps of {result['validation']['on']}:")
    print(f"{'alpha':>6} {'slots':>8} {'category':>9} {'mean diff':>10} {'category':>9}")
    for ours, yardstick in zip(result["slots"]["alphas"], result["mean_difference"]["alphas"], strict=True):
        print(
            f"{ours['alpha']:>6g} {ours['success']:>8.4f} {ours['category_kept']:>9.4f} "
            f"{yardstick['success']:>10.4f} {yardstick['category_kept']:>9.4f}"
        )
    for name in ("slots", "mean_difference"):
        part = result[name]
        print(f"{name}: {_with_error(part['best_success'], part['standard_error'])} at alpha {part['best_alpha']:g}")
    gain = result["slots_over_mean_difference"]
    print(f"slots over mean_difference: {_with_error(gain['difference'], gain['standard_error'])}")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f} (one subject: no standard error)" if error is None else f"{value:.4f} +- {error:.4f}"
