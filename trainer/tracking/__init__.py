"""Where figures go: metrics.jsonl, which is always written and is the truth, and MLflow, which is filled from it.

MLflow's absence never stops training. The only home of mlflow.
"""

from trainer.tracking.config import TrackingConfig
from trainer.tracking.description import DatasetInput
from trainer.tracking.figures import add_figures, measured
from trainer.tracking.model import log_model, save_model
from trainer.tracking.parent import Parent, open_parent
from trainer.tracking.store import connect
from trainer.tracking.tracker import STATUS, Filled, Tracker, add_artifacts, fill_in

__all__ = [
    "STATUS",
    "DatasetInput",
    "Filled",
    "Parent",
    "Tracker",
    "TrackingConfig",
    "add_artifacts",
    "add_figures",
    "connect",
    "fill_in",
    "log_model",
    "measured",
    "open_parent",
    "save_model",
]
