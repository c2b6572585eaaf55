"""What was measured of a run after its training, as numbers of the same MLflow run."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import DataError
from trainer.files import read_json
from trainer.run_folder import RunFolder
from trainer.tracking.config import OFF, reason, store_uri
from trainer.tracking.description import kept_uri
from trainer.tracking.points import Point, last_step
from trainer.tracking.store import StoredRun, connect

log = logging.getLogger(__name__)

MOST = 1 << 30  # bytes of a result
# Name -> where evaluation.json has it of each split.
OF_SPLITS = {
    "fvu": ("reconstruction", "fvu"),
    "l0": ("reconstruction", "l0"),
    "dead": ("reconstruction", "dead"),
    "diagonal_accuracy": ("binding", "diagonal_accuracy"),
    "slot_accuracy": ("binding", "slot_accuracy"),
    "auroc": ("labels", "auroc"),
    "firing_on_text": ("text", "concept_firing_rate"),
}


def measured(folder: RunFolder) -> dict[str, tuple[Path, float]]:
    """Name -> the file that holds it and its value: train/fvu, heldout/slot_accuracy, loss_recovered, swap/success ...

    Of evaluation.json and swap.json, where they are there. Raises DataError for damaged ones.
    """
    found: dict[str, tuple[Path, float]] = {}
    for path, figures in ((folder.evaluation, _of_evaluation), (folder.swap, _of_swap)):
        if path.exists():
            result = read_json(path, dict[str, Any], "write it again", limit=MOST)
            found |= {name: (path, float(v)) for name, v in figures(result) if isinstance(v, int | float)}
    return found


def _of_evaluation(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for split in ("train", "heldout"):
        for name, (section, key) in OF_SPLITS.items():
            yield f"{split}/{name}", result.get(split, {}).get(section, {}).get(key)
    yield "loss_recovered", (result.get("loss_recovered") or {}).get("recovered_over_mean")


def _of_swap(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for method in ("slots", "mean_difference"):
        yield f"swap/{method}", result.get(method, {}).get("best_success")
    yield "swap/alpha", result.get("slots", {}).get("best_alpha")


def points_of(folder: RunFolder) -> list[Point]:
    """The same, at the last step of metrics.jsonl and at the time of the file."""
    step = last_step(folder.metrics)
    by_file: dict[Path, dict[str, float]] = {}
    for name, (path, value) in measured(folder).items():
        by_file.setdefault(path, {})[name] = value
    return [Point(step, int(path.stat().st_mtime * 1000), values) for path, values in by_file.items()]


def add_figures(run_dir: Path) -> bool:
    """Bring the run's MLflow run level with what was measured.

    False when the run was not tracked or the store fails, which is logged.
    """
    folder, uri = RunFolder(run_dir), kept_uri(run_dir)
    if uri == OFF or not folder.mlflow_run_id.exists():
        return False
    try:
        client, run_id = connect(uri, run_dir), folder.mlflow_run_id.read_text().strip()
        StoredRun.add_later(client, run_id, points_of(folder))
    except DataError:
        raise
    except Exception as error:
        log.warning("not stored in MLflow (%s)", reason(error, store_uri(uri, run_dir)))
        return False
    return True
