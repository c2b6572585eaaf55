"""Which concept slot rows choose, against the concepts that they list.

Shapes: B rows of a batch, R concepts, M labels of a row at most.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from trainer.errors import DataError

MOST_WHOLE = 256  # concepts; the matrix of 5,000 is 200 MB of JSON


def confusion_matrix(predicted: Tensor, concept: Tensor, concepts: int) -> Tensor:
    """Counts [R, R + 1] fp64: row = true concept, column = chosen slot, last column = no slot; over rows that list a
    concept.

    A row that lists m concepts counts 1/m at each of them, and at its place on the diagonal where the chosen slot is
    any of them: rows, not labels, add up to shares. predicted [B] int64, -1 = no slot; concept [B, M]. Raises DataError
    on a label beyond R - 1.
    """
    if concept.numel() and int(concept.max()) >= concepts:
        raise DataError(
            f"label {int(concept.max())} is out of range for {concepts} concept slots; "
            "evaluate on shards of the same concepts"
        )
    row, column = (concept >= 0).nonzero(as_tuple=True)
    truth, chosen = concept[row, column].long(), predicted[row].long()
    chosen = torch.where(chosen < 0, concepts, chosen)
    right = (concept[row] == chosen[:, None]).any(dim=1)
    chosen = torch.where(right, truth, chosen)
    share = 1.0 / (concept >= 0).sum(dim=1)[row].double()
    cells = torch.bincount(truth * (concepts + 1) + chosen, share, minlength=concepts * (concepts + 1))
    return cells.double().reshape(concepts, concepts + 1)


def stored(confusion: Tensor) -> list[list[float]] | dict[str, list[float]]:
    """A confusion matrix [R, R + 1] for a JSON file: its rows, or above MOST_WHOLE concepts the cells above 0."""
    if len(confusion) <= MOST_WHOLE:
        return confusion.tolist()
    concept, slot = confusion.nonzero(as_tuple=True)
    return {"concept": concept.tolist(), "slot": slot.tolist(), "count": confusion[concept, slot].tolist()}


def restored(found: list[list[float]] | dict[str, list[float]], concepts: int) -> Tensor:
    """The matrix [R, R + 1] fp64 that `stored` was given."""
    if isinstance(found, list):
        return torch.tensor(found, dtype=torch.float64)
    matrix = torch.zeros(concepts, concepts + 1, dtype=torch.float64)
    concept, slot = (torch.tensor(found[name], dtype=torch.int64) for name in ("concept", "slot"))
    matrix[concept, slot] = torch.tensor(found["count"], dtype=torch.float64)
    return matrix


@dataclass
class Binding:
    """How well concept slots and concepts agree.

    diagonal_accuracy: mean over concepts of the share of a concept's rows that choose a slot of their concepts.
    diagonal_accuracy_assigned: the same under the one-to-one assignment of slots to concepts that maximises it.
    assignment: slot of each concept under that assignment.
    slot_accuracy: share of all rows with concepts that choose a slot of theirs (weights concepts by their rows).
    silent: share of those rows in which no concept slot is active.
    """

    diagonal_accuracy: float
    diagonal_accuracy_assigned: float
    assignment: list[int]
    slot_accuracy: float
    silent: float


def binding(confusion: Tensor) -> Binding:
    """Summarise a confusion matrix [R, R + 1]; concepts without a row are left out of the means."""
    counts = confusion.double().cpu()
    per_concept = counts.sum(dim=1)
    present = per_concept > 0
    if not bool(present.any()):
        raise DataError("no labelled row to evaluate binding on; extract prompts that name a concept")
    share = counts[:, :-1] / torch.where(present, per_concept, 1.0).unsqueeze(1)
    rows, slots = linear_sum_assignment(share.numpy(), maximize=True)
    assigned = share[torch.from_numpy(rows), torch.from_numpy(slots)]
    return Binding(
        diagonal_accuracy=share.diagonal()[present].mean().item(),
        diagonal_accuracy_assigned=assigned[present].mean().item(),
        assignment=[int(s) for s in slots],
        slot_accuracy=(counts.diagonal().sum() / counts.sum()).item(),
        silent=(counts[:, -1].sum() / counts.sum()).item(),
    )
