"""README.md of an exported dictionary: the model card of a hub, from the figures that the run's folder holds."""

import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.pretrained import Trained, trainer_name
from trainer.run_folder import RunFolder
from trainer.tracking import measured

NAMED = 50  # concepts that are listed
# Figures that a reader of a card asks for, by their names in trainer.tracking.measured.
SAID = {
    "fvu": "fraction of variance unexplained",
    "l0": "active slots of a row",
    "dead": "share of dead slots",
    "diagonal_accuracy": "diagonal binding accuracy",
    "slot_accuracy": "rows that choose their own slot",
    "auroc": "mean AUROC of concept slots",
    "firing_on_text": "firing of a concept slot on rows without a concept",
    "loss_recovered": "share of the model's loss that the reconstruction recovers over the mean",
    "slots": "concept swaps that succeed",
}


def card(trained: Trained, run: Path, licence: str, repository: str) -> str:
    """The text. run: folder that evaluation.json and swap.json are looked for in. licence: an identifier of the hub, or
    "" for none. repository: OWNER/NAME that the card says to load."""
    environment = Environment(
        loader=PackageLoader("tools"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    facts, dictionary = trained.facts, trained.dictionary
    training = {name: value for name, value in facts.training.items() if isinstance(value, str | int | float) and value}
    return environment.get_template("card.md").render(
        licence=licence,
        repository=repository,
        model=trained.model,
        hook_point=trained.hook_point,
        width=trained.width,
        slots=trained.slots,
        gate=dictionary.form.gate,
        token_position=training.pop("token_position", ""),
        concepts=trained.concepts[:NAMED],
        more=max(0, len(trained.concepts) - NAMED),
        gains=trained.gains,
        writes=dictionary.written is not None,
        training=training,
        figures=list(_figures(RunFolder.around(run))),
        trainer=trainer_name(),
    )


def _figures(folder: RunFolder) -> Iterator[tuple[str, str]]:
    """What was measured, as (what, figure)."""
    for name, (_, value) in measured(folder).items():
        split, _, figure = name.rpartition("/")
        if said := SAID.get(figure):
            rows = {"train": "training rows", "heldout": "held-out rows"}.get(split)
            yield f"{said}, {rows}" if rows else said, f"{value:.4g}"


def _cell(text: object) -> str:
    """Text in one cell of a table, nothing of it taken for markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", " ".join(str(text).split()))
