"""state.json: what a run needs beside weights and moments, and which files a checkpoint of it must have."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trainer.checkpoint.files import read_json
from trainer.dictionary import bank_sizes
from trainer.errors import DataError

SCHEMA = 1


@dataclass
class RunState:
    """What a run needs beside weights and moments. No random numbers are drawn from ambient state: all come from (seed, step).

    step: batches seen. updates: optimizer steps taken (a skipped update is none). stream: see Plan.state. rows_digest: see
    RowDigest. dictionary: its form. guard: see Guard.state. damage: masked blocks and rows over all ranks.
    """

    step: int
    updates: int
    stage: str
    seed: int
    stream: dict[str, Any]
    rows_digest: int
    dictionary: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)
    damage: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Content of state.json."""
        return {"schema": SCHEMA, **vars(self)}


# Lowest and highest value of the integers; a count of slots that no file can hold would only exhaust memory.
_RANGES = {
    "step": (0, 1 << 62),
    "updates": (0, 1 << 62),
    "seed": (-(1 << 63), 1 << 64),
    "rows_digest": (0, (1 << 64) - 1),
}
_FORM_RANGES = {
    "width": (1, 1 << 20),
    "answers": (0, 1 << 31),
    "free_slots": (1, 1 << 40),
    "bank_slots": (1, 1 << 40),
    "value_hidden": (1, 1 << 20),
}


def read_state(folder: Path) -> RunState:
    """state.json of a checkpoint folder. Raises DataError, one line, when it is foreign or malformed."""
    path = folder / "state.json"
    values = read_json(path)
    if values.pop("schema", None) != SCHEMA:
        raise DataError(f"{path} has another schema than {SCHEMA}; use the version that wrote it")
    known = {f.name: f.type for f in fields(RunState)}
    required = known.keys() - {"guard", "damage"}
    if not required <= values.keys() <= known.keys():
        wrong = sorted((required - values.keys()) | (values.keys() - known.keys()))
        raise DataError(f"{path}: field {wrong[0]!r:.80} is missing or unknown")
    _integers(path, values, _RANGES)
    for name in ("stream", "dictionary", "guard", "damage"):
        if not isinstance(values.get(name, {}), dict):
            raise DataError(f"{path}: field {name!r} is not an object")
    form = values["dictionary"]
    _integers(path, form, _FORM_RANGES)
    concepts = form.get("concepts")
    if not isinstance(concepts, list) or not all(isinstance(name, str) for name in concepts):
        raise DataError(f"{path}: field 'concepts' is not a list of names")
    if not all(isinstance(text, str) for text in (values["stage"], form.get("decoder_norm"))):
        raise DataError(f"{path}: fields 'stage' and 'decoder_norm' must be words")
    return RunState(**values)


def _integers(path: Path, values: dict[str, Any], ranges: dict[str, tuple[int, int]]) -> None:
    for name, (low, high) in ranges.items():
        value = values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise DataError(f"{path}: field {name!r} is not an integer from {low} to {high}")


def least_bytes(form: dict[str, Any], listed: int) -> dict[str, int]:
    """Files that a checkpoint of a dictionary of this form must have, each with a size that it cannot be below.

    form: RunState.dictionary; listed: number of files that there are. Raises DataError when they are too few, before a list of
    impossible length is made.
    """
    banks = -(-form["free_slots"] // form["bank_slots"])
    if 2 * banks > listed:
        raise DataError(f"it lists {listed} files, too few for {banks} banks")
    width, concepts = form["width"], len(form["concepts"])
    slots = {f"bank-{i:05d}": n for i, n in enumerate(bank_sizes(form["free_slots"], form["bank_slots"]))}
    weights = {"output": 4 * width, "concepts": 8 * concepts * width, **{u: 8 * n * width for u, n in slots.items()}}
    if concepts and form["answers"]:
        weights["value"] = 4 * form["value_hidden"] * (concepts + form["answers"])
    files = {f"dictionary/{unit}.safetensors": size for unit, size in weights.items()}
    # Two moments, in bf16 or fp32.
    files |= {f"optimizer/{unit}.safetensors": size for unit, size in weights.items()}
    return {"state.json": 2, "manifest.json": 2, **files}
