"""What every slot of a dictionary does on given rows, found in one pass: the contexts that activate it most, a
histogram of its activations, and of concept slots how well they tell their concept.

Only what is kept is held: the active entries of one bank on a batch, and a few numbers per slot.

Shapes: N rows in all, B of a batch, D width, S slots, n of a bank, R concepts, M labels of a row at most, k contexts of
a slot, w tokens on either side of one.
"""

import torch
from torch import Tensor

from trainer.dictionary import BankWeights, ConceptDictionary
from trainer.kernels import StepContext, active_entries
from trainer.labels import known, membership

BINS = 24  # of the histogram of a slot: two to an octave, from 2^-8
FINE, OCTAVE = 513, 16  # bins from which AUROC is computed: 0, then OCTAVE to an octave from 2^-20


def bin_of(z: Tensor) -> Tensor:
    """Which bin of the histogram activations above 0 fall into, int64."""
    return ((z.log2() + 8) * 2).floor().clamp(0, BINS - 1).long()


class Top:
    """The k largest values of each of n lists, the row that each is of, and a window of what lies around it.

    value [n, k] fp32, descending, 0 for none; row [n, k] int64; window [n, k, 2w + 1] fp16.
    """

    def __init__(self, lists: int, keep: int, width: int = 0):
        self.value = torch.zeros(lists, keep)
        self.row = torch.full((lists, keep), -1, dtype=torch.int64)
        self.window = torch.zeros(lists, keep, width, dtype=torch.float16)

    def wanted(self, number: Tensor, value: Tensor) -> Tensor:
        """Which of the entries (list, value > 0) are larger than the least that is kept, bool."""
        return value > self.value[number, -1]

    def offer(self, number: Tensor, value: Tensor, row: Tensor, window: Tensor | None = None) -> None:
        """Take entries (list, value > 0, row, window [m, 2w + 1]); of equal values the one that came first stays."""
        if not len(number):
            return
        keep = self.value.shape[1]
        order = value.argsort(descending=True, stable=True)
        order = order[number[order].argsort(stable=True)]
        lists, place, counts = number[order].unique_consecutive(return_inverse=True, return_counts=True)
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[place]
        first = rank < keep
        order, place, rank = order[first], place[first], rank[first] + keep
        values = torch.cat([self.value[lists], torch.zeros(len(lists), keep)], dim=1)
        rows = torch.cat([self.row[lists], torch.full((len(lists), keep), -1)], dim=1)
        values[place, rank], rows[place, rank] = value[order], row[order]
        values, best = values.sort(dim=1, descending=True, stable=True)
        best = best[:, :keep]
        self.value[lists], self.row[lists] = values[:, :keep], rows.gather(1, best)
        if window is not None:
            windows = torch.cat([self.window[lists], torch.zeros_like(self.window[lists])], dim=1)
            windows[place, rank] = window[order].half()
            self.window[lists] = windows.gather(1, best[..., None].expand(-1, -1, windows.shape[2]))


class Survey:
    """See the module's text.

    fired, total, most [S]: rows on which a slot is active, sum and largest of its activations. histogram [S, BINS].
    top: contexts of each slot. Of concept slots [R], over rows whose concepts are known: positives, negatives: rows
    with and without the concept; false: active without it; missed: silent with it; wrong, silent: such rows.
    """

    def __init__(self, dictionary: ConceptDictionary, concepts: int, contexts: int = 8, window: int = 8):
        slots = dictionary.slots
        self.dictionary, self.concepts, self.width = dictionary, concepts, window
        self._named = dictionary.rows(range(concepts)) if concepts else None
        self.rows = 0
        self._first = 0  # number of the first row of the next batch
        self.fired = torch.zeros(slots, dtype=torch.int64)
        self.total = torch.zeros(slots, dtype=torch.float64)
        self.most = torch.zeros(slots)
        self.histogram = torch.zeros(slots * BINS, dtype=torch.int64)
        self.top = Top(slots, contexts, 2 * window + 1)
        self.positives, self.negatives, self.false, self.missed = torch.zeros(4, concepts, dtype=torch.int64)
        self.wrong, self.silent = Top(concepts, contexts, 2 * window + 1), Top(concepts, contexts)
        self._fine = torch.zeros(2, concepts * FINE, dtype=torch.int64)  # of negatives, of positives

    @torch.no_grad()
    def add(self, h: Tensor, concept: Tensor, valid: Tensor) -> None:
        """The next rows: raw h [B, D], labels concept [B, M], valid bool [B]; others count as silent and unlabelled."""
        x = self.dictionary.normalise(h.to(self.dictionary.mean.device))
        # The product in bf16 only says where to look: activations are fp32 whatever it is (trainer/kernels/sparse.py).
        context, begin = StepContext(x, x.bfloat16(), None), 0
        for bank in self.dictionary.all_banks():
            if bank.slots:
                self._add_bank(bank.weights(), begin, context, valid.to(x.device))
            begin += bank.slots
        if self._named is not None:
            self._add_concepts(self._named.encode(x).cpu() * valid[:, None], concept.cpu(), valid.cpu())
        self.rows += int(valid.sum())
        self._first += len(h)

    def _add_bank(self, weights: BankWeights, begin: int, context: StepContext, valid: Tensor) -> None:
        row, slot, value = active_entries(weights, context)
        if not bool(valid.all()):
            kept = valid[row]
            row, slot, value = row[kept], slot[kept], value[kept]
        slots = len(weights.b_enc)
        part = slice(begin, begin + slots)
        self.fired[part] += torch.bincount(slot, minlength=slots).cpu()
        self.total[part] += torch.bincount(slot, weights=value.double(), minlength=slots).cpu()
        self.histogram.index_add_(
            0, ((slot + begin) * BINS + bin_of(value)).cpu(), torch.ones(len(slot), dtype=torch.int64)
        )
        most = torch.zeros(slots, device=value.device).scatter_reduce(0, slot, value, "amax")
        self.most[part] = torch.maximum(self.most[part], most.cpu())
        row, slot, value = row.cpu(), slot.cpu(), value.cpu()
        wanted = value > self.top.value[part, -1][slot]
        windows = self._around(slot * len(valid) + row, value, row[wanted], slot[wanted], len(valid))
        self.top.offer(slot[wanted] + begin, value[wanted], row[wanted] + self._first, windows)

    def _near(self, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The rows [m, 2w + 1] around rows of this batch, and which of them are in it; the others are at its edge."""
        near = row[:, None] + torch.arange(-self.width, self.width + 1, device=row.device)
        return near.clamp(0, rows - 1), (near >= 0) & (near < rows)

    def _around(self, places: Tensor, value: Tensor, row: Tensor, slot: Tensor, rows: int) -> Tensor:
        """Activations [m, 2w + 1] of slots on the rows around rows of this batch; 0 beyond it.

        places: slot x rows + row of all active entries, ascending, and value: their activations, [E].
        """
        if not len(row):
            return torch.zeros(0, 2 * self.width + 1)
        near, inside = self._near(row, rows)
        wanted = slot[:, None] * rows + near
        at = torch.searchsorted(places, wanted).clamp_max(len(places) - 1)
        return value[at] * (inside & (places[at] == wanted))

    def _add_concepts(self, z: Tensor, concept: Tensor, valid: Tensor) -> None:
        member = membership(concept, self.concepts)
        told = (known(concept) & valid)[:, None]
        for positive, chosen, counts in ((1, member & told, self.positives), (0, ~member & told, self.negatives)):
            counts += chosen.sum(dim=0)
            row, slot = (chosen & (z > 0)).nonzero(as_tuple=True)
            fine = 1 + ((z[row, slot].log2() + 20) * OCTAVE).floor().clamp(0, FINE - 2).long()
            self._fine[positive] += torch.bincount(slot * FINE + fine, minlength=self.concepts * FINE)
            active = torch.bincount(slot, minlength=self.concepts)
            if positive:
                self.missed += chosen.sum(dim=0) - active
                row, slot = (chosen & (z <= 0)).nonzero(as_tuple=True)
                value = 1.0 / (1.0 + self._first + row)  # the first ones
                wanted = self.silent.wanted(slot, value)
                self.silent.offer(slot[wanted], value[wanted], row[wanted] + self._first)
            else:
                self.false += active
                value = z[row, slot]
                wanted = self.wrong.wanted(slot, value)
                row, slot, value = row[wanted], slot[wanted], value[wanted]
                near, inside = self._near(row, len(z))
                self.wrong.offer(slot, value, row + self._first, z[near, slot[:, None]] * inside)

    def auroc(self) -> Tensor:
        """Share of pairs of a row with and a row without the concept in which the slot is more active on the first,
        ties counting half, [R] fp64; nan where there is no pair. From bins of 1 / OCTAVE of an octave."""
        negative, positive = self._fine.view(2, self.concepts, FINE).double()
        negative[:, 0] = self.negatives - negative.sum(dim=1)
        positive[:, 0] = self.positives - positive.sum(dim=1)
        below = negative.cumsum(dim=1) - negative
        won = (positive * (below + negative / 2)).sum(dim=1)
        return won / (self.negatives * self.positives)
