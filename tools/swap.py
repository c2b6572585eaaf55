"""What `alignsae swap` does; its arguments and its help are in tools/parsers."""

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from tools.swapping.choice import choose_swaps
from tools.swapping.methods import LEARNED, OURS, YARDSTICK, build, dimensions, other_runs
from tools.swapping.table import summary
from tools.swapping.trial import Trial, lead, measured
from trainer.analysis.evaluation import at_most
from trainer.analysis.interventions import answer_sets, score_swaps
from trainer.analysis.results import most_norm, rows_of, run_shards
from trainer.analysis.rivals import Slots, training_rows
from trainer.analysis.side_effects import Bystanders, beginnings
from trainer.checkpoint import load_dictionary
from trainer.errors import UserError
from trainer.files import write_result
from trainer.language_model import (
    EditableModel,
    encode_answer,
    hook_layer,
    load_language_model,
    load_tokenizer,
    matcher,
    read_prompts,
    read_texts,
)
from trainer.run_folder import RunFolder
from trainer.tracking import add_figures

KNOWS_LITTLE = 0.1  # accuracy of the unedited model below which swaps mean little
WINDOWS, WINDOW = 128, 48  # texts that are looked at, and their tokens


def run(args: argparse.Namespace) -> None:
    """Swap, score and write the JSON file."""
    if min(args.pairs, args.batch_size, args.learn_steps) < 1:
        raise UserError("--pairs, --batch-size and --learn-steps must be at least 1")
    if not all(0 < rate < 1e3 for rate in args.learn_rates):
        raise UserError("--learn-rates must be above 0 and below 1000")
    if args.learned and LEARNED not in args.rivals:
        raise UserError(f"--learned writes what {LEARNED} learned; add it to --rivals")
    if args.learn_texts and not any(name == LEARNED or dimensions(name, 1) for name in args.rivals):
        raise UserError(f"--learn-texts is for rivals that learn; add {LEARNED} or das to --rivals")
    if args.learn_texts and args.texts and args.learn_texts.resolve() == args.texts.resolve():
        raise UserError(f"--learn-texts {args.learn_texts}: what is learned with cannot be reported by --texts, too")
    dictionary, trained_on = load_dictionary(args.run_dir)
    dictionary.to(args.device)
    concepts = dictionary.concept_names
    if len(concepts) < 2:
        raise UserError(f"{args.run_dir} has {len(concepts)} concept slots; a swap needs two")
    layer = hook_layer(trained_on.hook_point)
    others = other_runs(args, dictionary, trained_on)
    records = read_prompts(args.prompts, load_tokenizer(args.model))
    source, _ = rows_of([args.train] if args.train else run_shards(args.run_dir), dictionary)
    rows = training_rows(at_most(source, most_norm(args.run_dir, trained_on)), len(concepts))
    model, tokenizer = load_language_model(args.model, args.device)
    match = matcher(args.match, tokenizer)
    choice = choose_swaps(args, records, concepts, match)
    swaps, answers = choice.reported.swaps, answer_sets(records, concepts)
    longest = max(len(encode_answer(tokenizer, a)) for a in frozenset().union(*answers))
    prompts = [s.prompt for s in swaps]
    editable = EditableModel(model, tokenizer, layer, args.batch_size)
    unedited = score_swaps(swaps, editable.answers(prompts, longest), answers, match)
    asked = {s.prompt: kind == "source_answer" for s, kind in zip(swaps, unedited.kinds, strict=True)}
    accuracy = sum(asked.values()) / len(asked)
    if accuracy < KNOWS_LITTLE:
        warn_of_unknown(args, accuracy, len(asked))
    windows = _windows(args, args.texts, model, tokenizer)
    taught = _halves(args, _windows(args, args.learn_texts, model, tokenizer))
    bystanders = Bystanders(editable, choice.reported.others, windows, match=match, max_new_tokens=longest)
    methods, rates = build(args, dictionary, rows, others, editable, choice, taught)
    # What learned to leave the rest alone did so at strength 1; success alone would choose a larger one.
    strengths = {name: [1.0] if args.learn_texts and name in rates else args.alphas for name in methods}
    with tqdm(unit="swap") as bar:
        trial = Trial(
            editable,
            choice,
            concepts,
            answers,
            unedited,
            editable.ends(prompts),
            bystanders,
            match=match,
            longest=longest,
            progress=bar.update,
        )
        bar.reset(sum(trial.swaps(len(alphas)) for alphas in strengths.values()))
        found = {}
        for name, method in methods.items():
            bar.set_description(name)
            found[name] = measured(trial, method, strengths[name])
    for name, rival in found.items():
        if name != OURS:
            rival.part["slots_over"] = lead(swaps, found[OURS], rival)
    if LEARNED in found:
        found[LEARNED].part["over_mean_difference"] = lead(swaps, found[LEARNED], found[YARDSTICK])
    over = found[YARDSTICK].part["slots_over"]["always"]["success"]
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
        "learn_rates": rates,
        "learning": {
            "pairs": len(choice.learning.swaps),
            "questions": 0 if taught[0] is None else len(choice.learning.others),
            "texts": 0 if taught[0] is None else len(taught[0]),
        },
        "validation": {"on": choice.on, "pairs": len(choice.validation.swaps)},
        "bystanders": {"questions": len(bystanders.others), "texts": 0 if windows is None else len(windows)},
        **{name: found[name].part for name in (OURS, YARDSTICK)},
        "rivals": {name: one.part for name, one in found.items() if name not in (OURS, YARDSTICK)},
        "slots_over_mean_difference": over,
    }
    learned = methods.get(LEARNED)
    if args.learned and isinstance(learned, Slots):
        write_result(args.learned, save({"W_write": learned.rows.contiguous().cpu()}))
        print(f"written: {args.learned}")
    out = args.out or RunFolder.around(args.run_dir).swap
    write_result(out, result)
    _show(result)
    tracked = args.out is None and add_figures(args.run_dir)
    print(f"written: {out}" + (", figures added to the MLflow run" if tracked else ""))


def _windows(args: argparse.Namespace, path: Path | None, model: Any, tokenizer: Any) -> Tensor | None:
    """Token ids of ordinary text, drawn from the first texts of a file; None without one."""
    if path is None:
        return None
    texts = list(islice(read_texts(path, args.field), 100 * WINDOWS))
    order = np.random.default_rng(args.seed).permutation(len(texts))
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", WINDOW)
    return beginnings(tokenizer, [texts[i] for i in order], WINDOWS, min(WINDOW, longest)).to(model.device)


def _halves(args: argparse.Namespace, windows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Windows to learn with, others to choose rates on."""
    if windows is None:
        return None, None
    if len(windows) < 2:
        raise UserError(f"{args.learn_texts} has one text that is long enough: one is learned with, another chosen on")
    return windows[::2], windows[1::2]


def warn_of_unknown(args: argparse.Namespace, accuracy: float, prompts: int) -> None:
    """Say loudly that the figures that follow mean little."""
    rule = f"--match {args.match}" + (" or --match prefix" if args.match == "exact" else "")
    print(
        f"alignsae: warning: without an edit the model answers {accuracy:.1%} of the {prompts} prompts ({rule}?): "
        "swaps of facts that it does not know measure nothing. `alignsae ask` with this model and these prompts keeps "
        "what it knows (--out known.jsonl) and suggests the rule",
        file=sys.stderr,
    )


def _show(result: dict[str, Any]) -> None:
    print(
        f"{result['pairs']} swaps ({result['split']} prompts), layer {result['layer']}, "
        f"unedited accuracy {result['unedited_accuracy']:.4f} (match: {result['match']})"
    )
    if result["learn_rates"]:
        learned = result["learning"]
        beside = f", leaving {learned['questions']} other questions and {learned['texts']} texts alone"
        print(f"learned from {learned['pairs']} swaps" + (beside if learned["texts"] else ""))
    print(f"alpha on {result['validation']['pairs']} swaps of {result['validation']['on']}:")
    print(f"{'alpha':>6} {'slots':>8} {'category':>9} {'mean diff':>10} {'category':>9}")
    for ours, yardstick in zip(result["slots"]["alphas"], result["mean_difference"]["alphas"], strict=True):
        print(
            f"{ours['alpha']:>6g} {ours['success']:>8.4f} {ours['category_kept']:>9.4f} "
            f"{yardstick['success']:>10.4f} {yardstick['category_kept']:>9.4f}"
        )
    print(summary(result))
