"""Binding, fragmentation and reconstruction of a trained dictionary -> RUN/evaluation.json

  alignsae evaluate --run runs/demo --train data/demo/layer-01/train --heldout data/demo/layer-01/heldout

Definitions are those of docs/design.md ("The numbers") and trainer/analysis/evaluation.py. --unsupervised adds a
dictionary that was trained without the align stage, for the comparison of fragmentation. --text adds rows of ordinary
text, on which concept slots are to be silent. --model and --prompts add the loss recovered: the language model's
cross-entropy on the held-out answers when the reconstruction replaces the activation.
"""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.analysis.evaluation import evaluate_split
from trainer.analysis.interventions import loss_recovered
from trainer.analysis.language_model import hook_layer, load_language_model, read_prompts
from trainer.analysis.results import most_norm, rows_of, run_shards
from trainer.checkpoint import load_dictionary
from trainer.errors import UserError
from trainer.files import write_result
from trainer.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae evaluate`."""
    parser.add_argument(
        "--run", dest="run_dir", type=Path, required=True, help="run folder (its newest checkpoint is read)"
    )
    parser.add_argument("--train", help="shards of the seen templates (default: the shards in RUN/config.yaml)")
    parser.add_argument(
        "--heldout", help="shards of the unseen templates (default: `heldout` beside --train, if there)"
    )
    parser.add_argument("--text", help="shards of ordinary text: rows without concepts beside those of each split")
    parser.add_argument("--unsupervised", type=Path, help="run folder of a dictionary without the align stage")
    parser.add_argument("--model", help="language model folder, for the loss recovered (needs --prompts)")
    parser.add_argument("--prompts", type=Path, help="prompts JSONL with the answers, for the loss recovered")
    parser.add_argument(
        "--device", default="cpu", help="device of the language model and the dictionary (default: cpu)"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: RUN/evaluation.json)")


def run(args: argparse.Namespace) -> None:
    """Evaluate and write the JSON file."""
    if (args.model is None) != (args.prompts is None):
        raise UserError("--model and --prompts belong together: give both for the loss recovered, or neither")
    splits = _splits(args)
    dictionary, trained_on = load_dictionary(args.run_dir)
    dictionary.to(args.device)
    result: dict[str, Any] = {
        "run": str(args.run_dir),
        "slots": dictionary.slots,
        "concepts": dictionary.concept_names,
        "width": dictionary.width,
        "trained_on": trained_on.digest,
        **_measure(dictionary, splits, args.text, most_norm=most_norm(args.run_dir, trained_on)),
    }
    if args.unsupervised:
        plain, _ = load_dictionary(args.unsupervised)
        plain.to(args.device)
        result["unsupervised"] = {
            "run": str(args.unsupervised),
            "slots": plain.slots,
            **_measure(plain, splits, None, aligned=False),
        }
    if args.model:
        model, tokenizer = load_language_model(args.model, args.device)
        records = [r for r in read_prompts(args.prompts) if r.answer]
        if not records:
            raise UserError(f"{args.prompts}: no prompt has an answer, so there is no loss to recover")
        chosen = [r for r in records if r.split == "heldout"] or records
        with tqdm(total=4 * len(chosen), desc="loss recovered", unit="prompt") as bar:
            result["loss_recovered"] = loss_recovered(
                model, tokenizer, chosen, hook_layer(trained_on.hook_point), dictionary, bar.update
            )
    out = args.out or RunFolder(args.run_dir).evaluation
    write_result(out, result)
    _show(result)
    print(f"written: {out}")


def _splits(args: argparse.Namespace) -> dict[str, list[str]]:
    train = [args.train] if args.train else run_shards(args.run_dir)
    heldout = args.heldout
    if heldout is None and len(train) == 1:
        beside = Path(train[0]).parent / "heldout"
        heldout = str(beside) if beside.is_dir() and beside != Path(train[0]) else None
    return {"train": train, **({"heldout": [heldout]} if heldout else {})}


def _measure(
    dictionary: Any,
    splits: dict[str, list[str]],
    text: str | None,
    *,
    aligned: bool = True,
    most_norm: float | None = None,
) -> dict[str, Any]:
    measured = {}
    beside = rows_of([text], dictionary)[0] if text else None
    for split, folders in splits.items():
        rows, sources = rows_of(folders, dictionary, match_concepts=aligned)
        concepts = dictionary.concept_names if aligned and sources.manifest.concepts else sources.manifest.concepts
        with tqdm(total=sources.rows, desc=split, unit="row") as bar:
            measured[split] = evaluate_split(dictionary, rows, concepts, bar.update, most_norm, beside)
    return measured


def _show(result: dict[str, Any]) -> None:
    for split in ("train", "heldout"):
        if split not in result:
            continue
        part = result[split]
        fit = part["reconstruction"]
        print(
            f"{split}: FVU {_text(fit['fvu'])}, L0 {fit['l0']:.1f} ({fit['l0_share']:.2%} of {result['slots']} slots), "
            f"dead {fit['dead']:.2%}"
        )
        if part.get("outliers", {}).get("reconstruction_without"):
            rest = part["outliers"]["reconstruction_without"]
            print(
                f"{split}: without {part['outliers']['rows']} rows of giant norm (data.max_norm): "
                f"FVU {_text(rest['fvu'])}, L0 {rest['l0']:.1f}"
            )
        if "binding" in part:
            bound, spread = part["binding"], part["fragmentation"]
            print(
                f"{split}: diagonal binding {_text(bound['diagonal_accuracy'])}, best assignment "
                f"{_text(bound['diagonal_accuracy_assigned'])}, slot accuracy {_text(bound['slot_accuracy'])}, "
                f"slots alive {bound['slots_alive']} of {len(result['concepts'])}\n"
                f"{split}: EffFeat over concept slots {_text(spread['concept_slots']['efffeat'])}, "
                f"over all slots {_text(spread['all']['efffeat'])}"
            )
        if text := part.get("text"):
            print(
                f"{split}: of {text['rows']:,} rows without a concept, a slot fires on a share of "
                f"{_text(text['concept_firing_rate'])}, any slot on {_text(text['any_concept_firing_rate'])}; AUROC of "
                f"rows with a concept against them {_text(text['auroc'])}"
            )
    if "loss_recovered" in result:
        print(f"loss recovered over the mean ablation: {_text(result['loss_recovered']['recovered_over_mean'])}")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
