"""Binding, fragmentation and reconstruction of a dictionary: functions of codes and labels.

Shapes: B rows of a batch, D model width, R concepts, M labels of a row at most, S slots, n slots of one bank. Rows come
from a function that can be called again, because large dictionaries need several passes; no pass holds a code of all
slots or of all rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.analysis.binding_matrix import binding, confusion_matrix, stored
from trainer.analysis.label_scores import figures_of, slot_scores, top1
from trainer.analysis.rows import RowSource
from trainer.dictionary import ConceptDictionary, SlotBank
from trainer.errors import DataError
from trainer.labels import listing, membership
from trainer.scores import predicted_slots

DECADES = 6  # of the density of slots, four bins to a decade, the last one ending at all rows
# Per-concept sums [R, n] are held for as many slots as fit here; more slots mean more passes over the rows.
SUMS_BYTES = 1 << 30


@dataclass
class Fragmentation:
    """Over how many slots a concept is spread. Arrays [R]; NaN where no slot is active on a concept.

    efffeat: EffFeat = exp(entropy of the concept's mean activation, as a distribution over slots), 1 = one slot.
    top1conc: Top1Conc = the largest share of a single slot.
    """

    efffeat: np.ndarray
    top1conc: np.ndarray

    def mean(self) -> tuple[float, float]:
        """Mean EffFeat and Top1Conc over the concepts that activate a slot at all (NaN when none does)."""
        active = ~np.isnan(self.efffeat)
        if not active.any():
            return float("nan"), float("nan")
        return float(self.efffeat[active].mean()), float(self.top1conc[active].mean())


def fragmentation(mean_activation: Iterable[Tensor]) -> Fragmentation:
    """EffFeat and Top1Conc from blocks [R, n] of mean activations that together cover the slots in question.

    With m the mean activations and T their sum over slots, entropy = log T - (sum of m log m) / T, so blocks add up.
    """
    parts = [
        (m.sum(dim=1), torch.special.entr(m).sum(dim=1), m.amax(dim=1)) for m in map(Tensor.double, mean_activation)
    ]
    totals, entropies, tops = (torch.stack(column) for column in zip(*parts, strict=True))
    total = totals.sum(dim=0)
    silent = total == 0
    efffeat = torch.where(silent, torch.nan, torch.exp(torch.log(total) + entropies.sum(dim=0) / total))
    top1conc = torch.where(silent, torch.nan, tops.amax(dim=0) / total)
    return Fragmentation(efffeat.cpu().numpy(), top1conc.cpu().numpy())


@torch.no_grad()
def activation_blocks(
    dictionary: ConceptDictionary, rows: RowSource, concepts: int, banks: Sequence[SlotBank] | None = None
) -> Iterator[Tensor]:
    """Mean activation per concept, as blocks [R, n] fp64 over consecutive slots; one pass over the rows per block.

    `concepts` is R of the labels, which an unsupervised dictionary does not know. `banks`: default all.
    """
    todo = list(dictionary.all_banks()) if banks is None else list(banks)
    exact = dictionary.mean.double()
    while todo:
        group = [todo.pop(0)]
        while todo and concepts * 8 * sum(b.slots for b in [*group, todo[0]]) <= SUMS_BYTES:
            group.append(todo.pop(0))
        sums = [exact.new_zeros(concepts, bank.slots) for bank in group]
        count = exact.new_zeros(concepts)
        for acts, concept in rows():
            labelled = listing(concept)
            member = membership(concept[labelled], concepts).T.float()
            x = dictionary.normalise(acts[labelled])
            count += member.sum(dim=1)
            for bank, into in zip(group, sums, strict=True):
                into += member @ bank.encode(x)
        yield torch.cat(sums, dim=1) / count.clamp_min(1).unsqueeze(1)


def concept_slot_means(dictionary: ConceptDictionary, rows: RowSource) -> Tensor:
    """Mean activation [R] fp32 of each concept slot over the rows of its own concept (zeros included)."""
    concepts = len(dictionary.concept_names)
    (block,) = activation_blocks(dictionary, rows, concepts, [dictionary.concepts])
    return block.diagonal().float()


def concept_means(rows: RowSource, concepts: int) -> Tensor:
    """Mean raw activation [R, D] fp32 of each concept."""
    total: Tensor | None = None
    count = torch.zeros(concepts)
    for acts, concept in rows():
        if total is None:
            total = acts.new_zeros(concepts, acts.shape[1], dtype=torch.float64)
        row, column = (concept >= 0).nonzero(as_tuple=True)
        index = concept[row, column].long()
        total.index_add_(0, index, acts[row].double())
        count += torch.bincount(index, minlength=concepts).cpu()
    if total is None or bool((count == 0).any()):
        missing = torch.nonzero(count == 0).flatten().tolist()
        raise DataError(f"no row for concept number(s) {missing}; their mean activation cannot be known")
    return (total / count.to(total).unsqueeze(1)).float()


@dataclass
class Reconstruction:
    """rows; FVU = fraction of variance unexplained, about the mean of these rows; L0 = mean active slots per row;
    dead = share of slots that are active on no row; density = free slots by the share of rows on which they are active,
    of those that are on any, DECADES x 4 bins; alive [R] = whether each concept slot is active on some row; confusion
    [R, R + 1] of `confusion_matrix`."""

    rows: int
    fvu: float
    l0: float
    dead: float
    density: list[int]
    alive: list[bool]
    confusion: Tensor


@torch.no_grad()
def reconstruct(
    dictionary: ConceptDictionary, rows: RowSource, progress: Callable[[int], Any] = lambda n: None
) -> Reconstruction:
    """One pass over the rows, bank by bank. `progress` is told the rows of each batch.

    Raises DataError when there is no row or a value is not finite.
    """
    concepts = len(dictionary.concept_names)
    count, active, residual, square = 0, 0.0, 0.0, 0.0
    total = torch.zeros_like(dictionary.mean, dtype=torch.float64)
    fired = [torch.zeros_like(bank.b_enc, dtype=torch.int64) for bank in dictionary.all_banks()]
    confusion = torch.zeros(concepts, concepts + 1, dtype=torch.float64, device=total.device)
    for acts, concept in rows():
        # FVU is the same in normalised units, where sums of squares do not cancel.
        x = dictionary.normalise(acts)
        x_hat = dictionary.output(torch.zeros_like(x))
        for index, bank in enumerate(dictionary.all_banks()):
            z = bank.encode(x)
            if index == 0 and concepts:
                confusion += confusion_matrix(predicted_slots(z), concept, concepts)
            x_hat += bank.decode(z)
            on = z > 0
            active += float(on.sum())
            fired[index] += on.sum(dim=0)
        count += x.shape[0]
        residual += float((x - x_hat).double().square().sum())
        square += float(x.double().square().sum())
        total += x.double().sum(dim=0)
        progress(x.shape[0])
    if count == 0:
        raise DataError("no row to evaluate")
    variance = square - float(total.square().sum()) / count
    if not (np.isfinite(variance) and np.isfinite(residual)):
        raise DataError("the activations hold NaN or infinite values; run `alignsae verify` on their folder")
    return Reconstruction(
        rows=count,
        fvu=residual / variance if variance > 0 else float("nan"),
        l0=active / count,
        dead=float((torch.cat(fired) == 0).double().mean()),
        density=density(torch.cat(fired[1:]).double() / count),
        alive=(fired[0] > 0).tolist(),
        confusion=confusion,
    )


def density(share: Tensor) -> list[int]:
    """How many slots, of shares of rows [n] above 0, are in each quarter of a decade; the first takes all below it."""
    bins = (4 * (DECADES + share[share > 0].log10())).floor().clamp(0, 4 * DECADES - 1).long()
    return torch.bincount(bins, minlength=4 * DECADES).tolist()


def at_most(rows: RowSource, norm: float | None) -> RowSource:
    """The rows whose norm is not above this; None: all."""
    if norm is None:
        return rows

    def kept() -> Iterator[tuple[Tensor, Tensor]]:
        for acts, concept in rows():
            small = _within(acts, norm)
            yield acts[small], concept[small]

    return kept


def _within(acts: Tensor, norm: float) -> Tensor:
    """Which rows [B, D] have a norm that is not above this, bool [B]."""
    return torch.linalg.vector_norm(acts, dim=1, dtype=torch.float32) <= norm


def evaluate_split(
    dictionary: ConceptDictionary,
    rows: RowSource,
    concepts: Sequence[str],
    progress: Callable[[int], Any] = lambda n: None,
    most_norm: float | None = None,
    text: RowSource | None = None,
) -> dict[str, Any]:
    """Everything about one split as JSON values (NaN becomes None).

    most_norm: where rows are above it, their number and the reconstruction without them are given beside that of all.
    `concepts` names the labels of the rows; without labels there is only the reconstruction. An unsupervised dictionary
    has concept slots that sleep: it binds nothing. text: further rows that list no concept, which slots are to tell
    from those of the split.
    """
    kept = 0

    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal kept
        for acts, concept in rows():
            kept += len(acts) if most_norm is None else int(_within(acts, most_norm).sum())
            yield acts, concept

    measured = reconstruct(dictionary, counted, progress)
    result: dict[str, Any] = {
        "rows": measured.rows,
        "reconstruction": _fit(measured, dictionary),
    }
    if most_norm is not None and kept < measured.rows:
        without = _fit(reconstruct(dictionary, at_most(rows, most_norm)), dictionary) if kept else None
        result["outliers"] = {"rows": measured.rows - kept, "reconstruction_without": without}
    if concepts:
        spread = fragmentation(activation_blocks(dictionary, rows, len(concepts)))
        result["fragmentation"] = {"all": _named(spread, concepts)}
    if concepts and dictionary.concept_names:
        bound = binding(measured.confusion)
        own = activation_blocks(dictionary, rows, len(concepts), [dictionary.concepts])
        result["fragmentation"]["concept_slots"] = _named(fragmentation(own), concepts)
        result["binding"] = {
            **vars(bound),
            "top1": top1(slot_scores(dictionary), len(dictionary.concept_names), rows),
            "slots_alive": sum(measured.alive),
            "alive": dict(zip(dictionary.concept_names, measured.alive, strict=True)),
            "confusion": stored(measured.confusion),
        }
        result |= figures_of(slot_scores(dictionary), dictionary.concept_names, rows, text)
    return result


def _fit(measured: Reconstruction, dictionary: ConceptDictionary) -> dict[str, Any]:
    return {
        "fvu": _number(measured.fvu),
        "l0": measured.l0,
        "l0_share": measured.l0 / dictionary.slots,
        "dead": measured.dead,
        "density": measured.density,
    }


def _named(found: Fragmentation, concepts: Sequence[str]) -> dict[str, Any]:
    efffeat, top1conc = found.mean()
    return {
        "efffeat": _number(efffeat),
        "top1conc": _number(top1conc),
        "per_concept": {
            name: {"efffeat": _number(e), "top1conc": _number(t)}
            for name, e, t in zip(concepts, found.efffeat, found.top1conc, strict=True)
        },
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
