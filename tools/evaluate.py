"""What `alignsae evaluate` does; its arguments and its help are in tools/parsers."""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.analysis.evaluation import at_most, evaluate_split
from trainer.analysis.evidence import notes
from trainer.analysis.interventions import loss_recovered
from trainer.analysis.label_scores import reader_figures
from trainer.analysis.results import documents_of, most_norm, rows_of, run_heldout, run_shards
from trainer.analysis.rivals import MeanDifference, fit_probe, training_rows
from trainer.analysis.text_loss import text_loss_recovered, text_windows
from trainer.checkpoint import load_dictionary
from trainer.errors import UserError
from trainer.files import write_result
from trainer.language_model import EditableModel, Prompt, hook_layer, load_language_model, read_prompts, read_texts
from trainer.run_folder import RunFolder
from trainer.tracking import add_figures


def run(args: argparse.Namespace) -> None:
    """Evaluate and write the JSON file."""
    if (args.model is None) != (args.prompts is None and args.texts is None):
        raise UserError("the loss recovered needs --model and, for answers, --prompts or, for text, --texts")
    for name in ("context", "tokens"):
        if getattr(args, name) < 2:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 2")
    splits, text = _splits(args)
    dictionary, trained_on = load_dictionary(args.run_dir)
    bound = most_norm(args.run_dir, trained_on)
    dictionary.to(args.device)
    result: dict[str, Any] = {
        "run": str(args.run_dir),
        "slots": dictionary.slots,
        "concepts": dictionary.concept_names,
        "width": dictionary.width,
        "trained_on": trained_on.digest,
        **_measure(dictionary, splits, text, most_norm=bound),
    }
    for split, readers in _rivals(dictionary, result, splits, text, bound).items():
        result[split] |= readers
    if "labels" in result.get("heldout", {}):
        result["heldout"]["labels"]["documents"] = documents_of(splits["heldout"], dictionary.concept_names)
    if args.unsupervised:
        plain, _ = load_dictionary(args.unsupervised)
        plain.to(args.device)
        result["unsupervised"] = {
            "run": str(args.unsupervised),
            "slots": plain.slots,
            **_measure(plain, splits, [], aligned=False),
        }
    records = read_prompts(args.prompts) if args.prompts else []
    if args.model:
        result |= _losses(args, dictionary, hook_layer(trained_on.hook_point), records, bound)
    templates = {split: len({r.template for r in records if r.split == split}) for split in splits}
    result["notes"] = notes(result, templates)
    out = args.out or RunFolder.around(args.run_dir).evaluation
    write_result(out, result)
    print(shown(result))
    tracked = args.out is None and add_figures(args.run_dir)
    print(f"written: {out}" + (", figures added to the MLflow run" if tracked else ""))


def _losses(
    args: argparse.Namespace, dictionary: Any, layer: int, records: list[Prompt], bound: float | None
) -> dict[str, Any]:
    """Loss recovered on the answers of prompts, and on text."""
    model, tokenizer = load_language_model(args.model, args.device)
    found = {}
    if args.prompts:
        answered = [r for r in records if r.answer]
        if not answered:
            raise UserError(f"{args.prompts}: no prompt has an answer, so there is no loss to recover")
        chosen = [r for r in answered if r.split == "heldout"] or answered
        with tqdm(total=4 * len(chosen), desc="loss recovered", unit="prompt") as bar:
            editable = EditableModel(model, tokenizer, layer, batch_size=64)
            losses = loss_recovered(editable, chosen, dictionary, bar.update)
        found["loss_recovered"] = {"prompts": len(chosen), **losses}
    if args.texts:
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", args.context)
        context = min(args.context, longest)
        windows, texts = text_windows(tokenizer, read_texts(args.texts, args.field), context, args.tokens)
        with tqdm(total=4 * sum(map(len, windows)), desc="loss recovered on text", unit="token") as bar:
            losses = text_loss_recovered(model, windows, layer, dictionary, bound, bar.update)
        found["text_loss_recovered"] = {"texts": texts, **losses}
    return found


def _splits(args: argparse.Namespace) -> tuple[dict[str, list[str]], list[str]]:
    """Shard folders of each split, and those of ordinary text."""
    train = [args.train] if args.train else run_shards(args.run_dir)
    heldout, text = [args.heldout] if args.heldout else [], [args.text] if args.text else []
    if not args.train and not args.heldout:  # the folders of the run go together
        heldout, beside_them = run_heldout(args.run_dir)
        text = text or beside_them
    beside = Path(train[0]).parent / "heldout"
    if not heldout and len(train) == 1 and beside.is_dir() and beside != Path(train[0]):
        heldout = [str(beside)]
    return {"train": train, **({"heldout": heldout} if heldout else {})}, text


def _measure(
    dictionary: Any,
    splits: dict[str, list[str]],
    text: list[str],
    *,
    aligned: bool = True,
    most_norm: float | None = None,
) -> dict[str, Any]:
    measured = {}
    beside = rows_of(text, dictionary)[0] if text else None
    for split, folders in splits.items():
        rows, sources = rows_of(folders, dictionary, match_concepts=aligned)
        concepts = dictionary.concept_names if aligned and sources.manifest.concepts else sources.manifest.concepts
        with tqdm(total=sources.rows, desc=split, unit="row") as bar:
            measured[split] = evaluate_split(dictionary, rows, concepts, bar.update, most_norm, beside)
    return measured


def _rivals(
    dictionary: Any, result: dict[str, Any], splits: dict[str, list[str]], text: list[str], bound: float | None
) -> dict[str, dict[str, Any]]:
    """By split a logistic probe and class means of the training rows; none where a concept has no row to learn from."""
    names, labels = dictionary.concept_names, result["train"].get("labels", {"per_concept": {}})["per_concept"]
    if not labels or not all(found["rows"] for found in labels.values()):
        return {}
    source, _ = rows_of(splits["train"], dictionary)
    rows = training_rows(at_most(source, bound), len(names))
    probe, means = fit_probe(rows), MeanDifference(rows)
    beside = rows_of(text, dictionary)[0] if text else None
    found: dict[str, dict[str, Any]] = {}
    for split, folders in splits.items():
        if "labels" in result[split]:
            split_rows, _ = rows_of(folders, dictionary)
            found[split] = {
                "probe": {"l2": probe.l2, **reader_figures(probe.scores, names, split_rows, beside)},
                "mean_difference": reader_figures(means.scores, names, split_rows, beside),
            }
    return found


def shown(result: dict[str, Any]) -> str:
    """What is printed of a result."""
    lines = []
    for split in ("train", "heldout"):
        if split not in result:
            continue
        part = result[split]
        fit = part["reconstruction"]
        lines.append(
            f"{split}: FVU {_text(fit['fvu'])}, L0 {fit['l0']:.1f} ({fit['l0_share']:.2%} of {result['slots']} slots), "
            f"dead {fit['dead']:.2%}"
        )
        if part.get("outliers", {}).get("reconstruction_without"):
            rest = part["outliers"]["reconstruction_without"]
            lines.append(
                f"{split}: without {part['outliers']['rows']} rows of giant norm (data.max_norm): "
                f"FVU {_text(rest['fvu'])}, L0 {rest['l0']:.1f}"
            )
        if "binding" in part:
            bound, spread = part["binding"], part["fragmentation"]
            lines.append(
                f"{split}: diagonal binding {_text(bound['diagonal_accuracy'])}, best assignment "
                f"{_text(bound['diagonal_accuracy_assigned'])}, slot accuracy {_text(bound['slot_accuracy'])}, "
                f"slots alive {bound['slots_alive']} of {len(result['concepts'])}\n"
                f"{split}: EffFeat over concept slots {_text(spread['concept_slots']['efffeat'])}, "
                f"over all slots {_text(spread['all']['efffeat'])}"
            )
        if "probe" in part:
            own = {"top1": part["binding"]["top1"], **part["labels"]}
            readers = [own, part["probe"], part["mean_difference"]]
            lines.append(
                f"{split}: slots, logistic probe, nearest class mean: top 1, silent or not, {_texts(readers, 'top1')}\n"
                f"{split}: likewise: AUROC {_texts(readers, 'auroc')}; mean average precision "
                f"{_texts(readers, 'mean_average_precision')}"
            )
        if text := part.get("text"):
            beside = part.get("probe", {}).get("auroc_against_text")
            lines.append(
                f"{split}: of {text['rows']:,} rows without a concept, a slot fires on a share of "
                f"{_text(text['concept_firing_rate'])}, any slot on {_text(text['any_concept_firing_rate'])}; AUROC of "
                f"rows with a concept against them {_text(text['auroc'])}"
                + (f", of the probe {_text(beside)}" if beside else "")
            )
    for key, where in (("loss_recovered", "answers"), ("text_loss_recovered", "text")):
        if losses := result.get(key):
            lines.append(
                f"{where}: cross-entropy {losses['cross_entropy_original']:.3f}, with the reconstruction "
                f"{losses['cross_entropy_reconstruction']:.3f}; loss recovered {_text(losses['recovered_over_mean'])} "
                f"over the mean, {_text(losses['recovered_over_zero'])} over zero"
                + (f"; {giant} activations of giant norm stayed" if (giant := losses.get("left_alone")) else "")
            )
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _texts(parts: list[dict[str, Any]], name: str) -> str:
    return ", ".join(_text(part[name]) for part in parts)
