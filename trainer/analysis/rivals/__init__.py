"""Ways to read concepts in activations and to change them: the concept slots, and what stands beside them.

Each file is one way, behind the interface of method.py. All are fitted on the same training rows (rows.py).
"""

from trainer.analysis.rivals.alignment import Alignment, learn_basis
from trainer.analysis.rivals.erasure import Erasure
from trainer.analysis.rivals.learning import Learning, Lesson, lesson_loss
from trainer.analysis.rivals.mean_difference import MeanDifference
from trainer.analysis.rivals.method import Method, when_read
from trainer.analysis.rivals.probe import Probe, fit_probe
from trainer.analysis.rivals.rows import TrainingRows, training_rows
from trainer.analysis.rivals.slots import Slots, best_slots, learn_rows, slot_means

__all__ = [
    "Alignment",
    "Erasure",
    "Learning",
    "Lesson",
    "MeanDifference",
    "Method",
    "Probe",
    "Slots",
    "TrainingRows",
    "best_slots",
    "fit_probe",
    "learn_basis",
    "learn_rows",
    "lesson_loss",
    "slot_means",
    "training_rows",
    "when_read",
]
