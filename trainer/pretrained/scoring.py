"""What `mlflow.pyfunc.load_model` makes of an exported dictionary: raw activations in, codes out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.pretrained.trained import Trained, read_trained


class Scorer:
    """`predict` of MLflow's python_function models."""

    def __init__(self, trained: Trained):
        self.trained = trained

    @torch.no_grad()
    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """Code [B, S] fp32 of raw activations [B, D], concept slots first."""
        raw = torch.from_numpy(np.array(model_input, dtype=np.float32))  # a copy: torch takes no read-only memory
        return self.trained.encode(raw).numpy()


def _load_pyfunc(path: str) -> Scorer:
    """MLflow calls it by this name; path: of an export."""
    return Scorer(read_trained(Path(path)))
