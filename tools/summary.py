"""What `alignsae summary` does; its arguments and its help are in tools/parsers."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.analysis.results import read_result
from trainer.errors import UserError
from trainer.files import write_result
from trainer.run_folder import RunFolder

EXTRA = ("swaps", "concepts", "l0_share")  # for the bars only, not in summary.json


def run(args: argparse.Namespace) -> int:
    """Write summary.json, print the table; 1 when a bar is missed."""
    folder = RunFolder.around(args.run_dir)
    evaluation = read_result(folder.evaluation, f"run `alignsae evaluate --run {args.run_dir}` first")
    swap = read_result(folder.swap, f"run `alignsae swap --run {args.run_dir}` first")
    lm = read_result(args.lm / "lm_report.json", "name the folder that `alignsae finetune-lm` wrote")
    plain = evaluation.get("unsupervised")
    if plain is None or Path(plain["run"]) != args.unsupervised or "heldout" not in evaluation:
        raise UserError(
            f"{folder.evaluation} does not compare with {args.unsupervised} "
            "on train and held-out shards; "
            f"run `alignsae evaluate --run {args.run_dir} --unsupervised {args.unsupervised} --train ... --heldout ...`"
        )
    figures = collect(evaluation, swap, lm, _seconds(args.seconds_file))
    write_result(folder.summary, {key: value for key, value in figures.items() if key not in EXTRA})
    table, passed = compare(figures, read_bars(args.bars))
    print(table)
    print(f"written: {folder.summary}")
    return 0 if passed else 1


def collect(
    evaluation: Mapping[str, Any], swap: Mapping[str, Any], lm: Mapping[str, Any], seconds: float
) -> dict[str, float | None]:
    """The figures of summary.json, and those of EXTRA."""
    train, heldout = evaluation["train"], evaluation["heldout"]
    reconstructions = [train["reconstruction"], heldout["reconstruction"]]
    return {
        "lm_answer_accuracy": lm["answer_accuracy"],
        "binding_diagonal_accuracy": train["binding"]["diagonal_accuracy"],
        "concept_slots_alive": train["binding"]["slots_alive"],
        "slot_accuracy_heldout": heldout["binding"]["slot_accuracy"],
        "swap_success_best": swap["slots"]["best_success"],
        "swap_alpha_best": swap["slots"]["best_alpha"],
        "swap_success_mean_difference": swap["mean_difference"]["best_success"],
        "efffeat_concept": train["fragmentation"]["concept_slots"]["efffeat"],
        "efffeat_all": train["fragmentation"]["all"]["efffeat"],
        "efffeat_unsupervised": evaluation["unsupervised"]["train"]["fragmentation"]["all"]["efffeat"],
        "top1conc_all": train["fragmentation"]["all"]["top1conc"],
        "fvu": max(r["fvu"] for r in reconstructions),
        "l0": max(r["l0"] for r in reconstructions),
        "slots": evaluation["slots"],
        "seconds": seconds,
        "swaps": swap["pairs"] if swap["split"] == "heldout" else 0,
        "concepts": len(evaluation["concepts"]),
        "l0_share": max(r["l0_share"] for r in reconstructions),
    }


def compare(figures: Mapping[str, float | None], rows: list[dict[str, Any]]) -> tuple[str, bool]:
    """The table as text, and whether every row with a bar is met. A figure that does not exist misses its bar."""
    lines, passed = [], True
    for row in rows:
        value = _figure(figures, row["value"])
        digits = row.get("digits", 3)
        shown = "none" if value is None else f"{value:.{digits}f}"
        bar, verdict = "reported", ""
        for word, sign in (("at_least", ">="), ("at_most", "<=")):
            if word in row:
                limit = _limit(figures, row, word)
                met = value is not None and limit is not None and (value >= limit if sign == ">=" else value <= limit)
                bar = f"{sign} {'none' if limit is None else f'{limit:.{digits}f}'}"
                verdict = "pass" if met else "MISSED"
                passed &= met
        lines.append((row["measure"], shown, bar, verdict))
    header = ("measure", "value", "bar", "")
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(3)]
    text = [
        f"{m:<{widths[0]}}  {v:>{widths[1]}}  {b:<{widths[2]}}  {verdict}".rstrip()
        for m, v, b, verdict in [header, *lines]
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]]), passed


def _figure(figures: Mapping[str, float | None], key: str) -> float | None:
    if key not in figures:
        raise UserError(f"the bars name {key!r}, which is no figure; there are {', '.join(figures)}")
    return figures[key]


def _limit(figures: Mapping[str, float | None], row: Mapping[str, Any], word: str) -> float | None:
    limit = _figure(figures, row[word]) if isinstance(row[word], str) else float(row[word])
    return None if limit is None else limit * row.get("factor", 1)


def read_bars(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a bars file; configs/demo_bars.yaml describes the form. Raises UserError when there are none."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; name the file of rows and bars with --bars")
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict) or not content.get("rows"):
        raise UserError(f"{path} has no `rows`; see configs/demo_bars.yaml for the form")
    return content["rows"]


def _seconds(path: Path) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must hold the wall time in seconds: {error}") from error
