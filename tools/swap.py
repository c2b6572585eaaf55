"""Swap one concept for another in a running language model -> RUN/swap.json

  alignsae swap --run runs/demo --model models/demo --prompts data/demo/questions.jsonl

At the last prompt token the slot of the asked relation is set to 0 and the slot of another relation to alpha times its
mean activation on its own concept (training shards); the model then answers greedily. A swap succeeds when the whole
answer is the other relation's answer for the same subject. Beside it stands the yardstick that needs no dictionary:
h + alpha * (mean of the target relation - mean of the asked relation).
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
    answer_matches,
    encode_answer,
    generate_answers,
    hook_layer,
    load_language_model,
    read_prompts,
)
from trainer.analysis.results import rows_of, run_shards
from trainer.checkpoint import load_dictionary
from trainer.errors import UserError
from trainer.files import write_result
from trainer.run_folder import RunFolder

EXAMPLES = 20  # of each kind of failure


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
    swaps = swap_pairs(
        records, concepts, split=None if args.split == "all" else args.split, pairs=args.pairs, seed=args.seed
    )
    answers = answer_sets(records, concepts)
    rows, _ = rows_of(args.train or run_shards(args.run_dir), dictionary)
    slot_means, class_means = concept_slot_means(dictionary, rows), concept_means(rows, len(concepts))
    model, tokenizer = load_language_model(args.model, args.device)
    longest = max(len(encode_answer(tokenizer, a)) for a in frozenset().union(*answers))

    def attempt(edit_for: Callable[[Tensor, Tensor], Edit], bar: tqdm) -> tuple[SwapScore, list[str]]:
        texts = generate_edited(
            model,
            tokenizer,
            layer,
            swaps,
            edit_for,
            max_new_tokens=longest,
            batch_size=args.batch_size,
            progress=bar.update,
        )
        return score_swaps(swaps, texts, answers), texts

    tried: dict[str, list[tuple[float, SwapScore, list[str]]]] = {"slots": [], "mean_difference": []}
    with tqdm(total=2 * len(args.alphas) * len(swaps), desc="swaps", unit="swap") as bar:
        for alpha in args.alphas:
            slots = partial(slot_swap, dictionary, strength=alpha * slot_means, write_back=args.mode)
            tried["slots"].append((alpha, *attempt(slots, bar)))
            yardstick = partial(mean_difference_swap, class_means, alpha=alpha)
            tried["mean_difference"].append((alpha, *attempt(yardstick, bar)))
    prompts = sorted({(s.prompt, s.source_answer) for s in swaps})
    unedited = generate_answers(model, tokenizer, [p for p, _ in prompts], longest, args.batch_size)
    result = {
        "run": str(args.run_dir),
        "model": str(args.model),
        "layer": layer,
        "mode": args.mode,
        "split": args.split,
        "pairs": len(swaps),
        "seed": args.seed,
        "concepts": concepts,
        "unedited_accuracy": sum(answer_matches(t, a) for t, (_, a) in zip(unedited, prompts, strict=True))
        / len(prompts),
        **{method: _summarise(swaps, attempts, concepts) for method, attempts in tried.items()},
    }
    out = args.out or RunFolder(args.run_dir).swap
    write_result(out, result)
    _show(result)
    print(f"written: {out}")


def _summarise(
    swaps: Sequence[Swap], attempts: list[tuple[float, SwapScore, list[str]]], concepts: Sequence[str]
) -> dict[str, Any]:
    """Results per alpha, and matrix [source][target], failures and examples at the best one (the smaller of equals)."""
    best_alpha, best, texts = max(attempts, key=lambda entry: (entry[1].success, -entry[0]))
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
        "alphas": [
            {
                "alpha": alpha,
                "success": score.success,
                "category_kept": score.category_kept,
                "category_kept_of_failures": score.category_kept_of_failures,
                "unchanged": score.share("source_answer"),
            }
            for alpha, score, _ in attempts
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
        f"unedited accuracy {result['unedited_accuracy']:.4f}"
    )
    print(f"{'alpha':>6} {'slots':>8} {'category':>9} {'mean diff':>10} {'category':>9}")
    for ours, yardstick in zip(result["slots"]["alphas"], result["mean_difference"]["alphas"], strict=True):
        print(
            f"{ours['alpha']:>6g} {ours['success']:>8.4f} {ours['category_kept']:>9.4f} "
            f"{yardstick['success']:>10.4f} {yardstick['category_kept']:>9.4f}"
        )
