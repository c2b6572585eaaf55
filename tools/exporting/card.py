"""README.md of an exported dictionary: the model card of a hub, from the figures that the run's folder holds."""

import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.analysis.results import read_result
from trainer.pretrained import Trained, trainer_name
from trainer.run_folder import RunFolder

NAMED = 50  # concepts that are listed


def card(trained: Trained, run: Path, licence: str) -> str:
    """The text. run: folder that evaluation.json and swap.json are looked for in. licence: an identifier of the hub, or
    "" for none."""
    environment = Environment(
        loader=PackageLoader("tools"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    facts, dictionary = trained.facts, trained.dictionary
    training = {name: value for name, value in facts.training.items() if isinstance(value, str | int | float) and value}
    return environment.get_template("card.md").render(
        licence=licence,
        model=trained.model,
        hook_point=trained.hook_point,
        width=trained.width,
        slots=trained.slots,
        gate=dictionary.form.gate,
        token_position=training.pop("token_position", ""),
        concepts=trained.concepts[:NAMED],
        more=max(0, len(trained.concepts) - NAMED),
        gains=trained.gains,
        training=training,
        figures=list(_figures(RunFolder(run))),
        trainer=trainer_name(),
    )


def _figures(folder: RunFolder) -> Iterator[tuple[str, str]]:
    """What was measured, as (what, figure)."""
    if folder.evaluation.exists():
        evaluation = read_result(folder.evaluation, "run `alignsae evaluate` again")
        for split in ("train", "heldout"):
            found = evaluation.get(split, {})
            places = {
                "fraction of variance unexplained": ("reconstruction", "fvu"),
                "active slots of a row": ("reconstruction", "l0"),
                "share of dead slots": ("reconstruction", "dead"),
                "diagonal binding accuracy": ("binding", "diagonal_accuracy"),
                "rows that choose their own slot": ("binding", "slot_accuracy"),
                "mean AUROC of concept slots": ("labels", "auroc"),
                "firing of a concept slot on rows without a concept": ("text", "concept_firing_rate"),
            }
            for what, (section, key) in places.items():
                value = found.get(section, {}).get(key)
                if isinstance(value, int | float):
                    yield f"{what}, {split} rows ({found['rows']})", f"{value:.4g}"
        recovered = (evaluation.get("loss_recovered") or {}).get("recovered_over_mean")
        if isinstance(recovered, int | float):
            yield "share of the model's loss that the reconstruction recovers over the mean", f"{recovered:.4g}"
    if folder.swap.exists():
        swap = read_result(folder.swap, "run `alignsae swap` again")
        success = swap.get("slots", {}).get("best_success")
        if isinstance(success, int | float):
            yield (
                f"concept swaps that succeed ({swap.get('split')} prompts, {swap.get('pairs')} swaps)",
                f"{success:.4g}",
            )


def _cell(text: object) -> str:
    """Text in one cell of a table, nothing of it taken for markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", " ".join(str(text).split()))
