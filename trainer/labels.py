"""What the concept labels of a row mean, for shards, losses and evaluation alike.

A row is unknown, has explicitly no concept, or lists the concepts that hold. As integers [n, M]: the concepts' numbers
first, then padding with UNKNOWN; NONE alone for no concept. So the first column says which of the three a row is.

Shapes: n or B rows, M labels that a row can have, R concepts.
"""

import numpy as np
import torch
from torch import Tensor

UNKNOWN, NONE = -1, -2
MOST_PER_ROW = 256  # M; each row of a batch holds as many


class BadLabel(ValueError):
    """Labels that mean nothing; row is the first such row."""

    def __init__(self, row: int, problem: str):
        super().__init__(problem)
        self.row = row


def canonical(values: np.ndarray, concepts: int) -> np.ndarray:
    """Labels [n] or [n, M] of any integer type, checked, as int32 [n, M] with padding behind what a row lists.

    concepts: R. Raises BadLabel for numbers that name nothing, and for rows that list a concept twice or NONE beside a
    concept.
    """
    labels = values[:, None] if values.ndim == 1 else values
    if not labels.size:
        return labels.astype(np.int32)
    if int(labels.min()) < NONE or int(labels.max()) >= concepts:
        row, column = np.argwhere((labels < NONE) | (labels >= concepts))[0]
        raise BadLabel(int(row), f"concept label {labels[row, column]} is outside {NONE}..{concepts - 1}")
    labels = labels.astype(np.int32, copy=False)
    if labels.shape[1] == 1:
        return labels
    if ((labels[:, :-1] == UNKNOWN) & (labels[:, 1:] != UNKNOWN)).any():
        order = np.argsort(labels == UNKNOWN, axis=1, kind="stable")
        labels = np.take_along_axis(labels, order, axis=1)
    beside = (labels[:, 1:] == NONE).any(axis=1) | (labels[:, 0] == NONE) & (labels[:, 1] != UNKNOWN)
    if beside.any():
        raise BadLabel(int(beside.argmax()), f"concept label {NONE} (no concept) stands beside another one")
    ordered = np.sort(labels, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row, column = np.argwhere(twice)[0]
        raise BadLabel(int(row), f"concept label {ordered[row, column]} is listed twice")
    return labels


def narrowed(labels: np.ndarray) -> np.ndarray:
    """Canonical labels [n, M] without the columns that are padding in every row; one column stays."""
    used = np.flatnonzero((labels != UNKNOWN).any(axis=0))
    return labels[:, : used[-1] + 1 if len(used) else 1]


def widened(labels: np.ndarray, per_row: int) -> np.ndarray:
    """Canonical labels [n, m] padded to [n, per_row]; itself where it is as wide."""
    missing = per_row - labels.shape[1]
    return np.pad(labels, ((0, 0), (0, missing)), constant_values=UNKNOWN) if missing else labels


def unknown_as_none(labels: np.ndarray) -> np.ndarray:
    """Canonical labels [n, M] with every unknown row made one that has explicitly no concept; a copy."""
    changed = labels.copy()
    changed[changed[:, 0] == UNKNOWN, 0] = NONE
    return changed


def listing(concept: Tensor) -> Tensor:
    """Which rows of labels [B, M] list a concept, bool [B]."""
    return concept[:, 0] >= 0


def known(concept: Tensor) -> Tensor:
    """Which rows of labels [B, M] are not unknown, bool [B]: those that list a concept or have explicitly none."""
    return concept[:, 0] != UNKNOWN


def membership(concept: Tensor, concepts: int) -> Tensor:
    """Which concepts rows list, bool [B, R], from labels [B, M]."""
    # One more column takes what is no concept.
    member = torch.zeros(len(concept), concepts + 1, dtype=torch.bool, device=concept.device)
    return member.scatter_(1, torch.where(concept < 0, concepts, concept).long(), True)[:, :concepts]
