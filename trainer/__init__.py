"""Distributed trainer for concept-aligned sparse autoencoders (AlignSAE, arXiv 2512.02004).

    from trainer import load, steer

load(path) -> Trained: the dictionary of a run, a checkpoint, an export or an import, with `encode`, `decode`,
`concepts`, `gains` and `hook_point`. steer(model, dictionary, {"employer": 2.0}): a context in which a language model
runs with slots changed, and their activations are read back. Both are imported when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.analysis.steering import Steering, steer
    from trainer.pretrained.trained import Trained
    from trainer.pretrained.trained import read_trained as load

__all__ = ["Steering", "Trained", "load", "steer"]

_HOMES = {
    "Steering": ("trainer.analysis.steering", "Steering"),
    "Trained": ("trainer.pretrained.trained", "Trained"),
    "load": ("trainer.pretrained.trained", "read_trained"),
    "steer": ("trainer.analysis.steering", "steer"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
