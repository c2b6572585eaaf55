"""Checkpoints that name no rank: any strategy and world loads any of them.

There is one safetensors file per unit (bank, concepts, output bias, value head):

    checkpoints/step-00000100/   state.json manifest.json hashes.json COMPLETE
                                 dictionary/UNIT.safetensors optimizer/UNIT.safetensors
    checkpoints/latest           name of the newest complete folder
    checkpoints/best             name of that of the best evaluation (checkpoint.best)

Commit protocol: everything goes to step-N.tmp and is synced to disk; all ranks acknowledge; hashes.json lists what was
written; the folder is renamed; COMPLETE is written; `latest` moves last. Only safetensors and JSON are ever read.
"""

from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.restore import (
    find,
    is_complete,
    kept_form,
    load_dictionary,
    load_moments,
    load_unit,
    refuse_later,
    verify,
)
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state import Best, RunState, read_state

__all__ = [
    "Best",
    "CheckpointConfig",
    "RunState",
    "Saver",
    "find",
    "is_complete",
    "kept_form",
    "load_dictionary",
    "load_moments",
    "load_unit",
    "read_state",
    "refuse_later",
    "verify",
]
