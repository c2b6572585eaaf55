"""Held-out rows during training: read once, evaluated every so many steps, and what the best checkpoint is by them."""

from trainer.heldout.evaluations import Evaluations, check_evaluation
from trainer.heldout.rows import load_heldout, read_parts

__all__ = ["Evaluations", "check_evaluation", "load_heldout", "read_parts"]
