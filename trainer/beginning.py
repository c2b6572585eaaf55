"""Free slots that begin along rows of the data (dictionary.begin: rows).

A slot's encoder and decoder row keep their norms and take the direction of a row of the first batches, with a share of
the random direction that they have: rows of the data may be equal, slots must not start alike. Its bias leaves it
active on as many rows as the others.

Shapes: B rows of this rank, G of the global batch, D width, n slots of a bank, m slots.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.dictionary import bank_unit
from trainer.strategies import Strategy
from trainer.stream import Batch
from trainer.topology import Topology

ROW, RANDOM = 0.7, 0.3  # shares, of vectors of norm 1
CHUNK = 1024  # slots whose pre-activations [chunk, G] are held at a time


@torch.no_grad()
def begin_along_rows(strategy: Strategy, batches: Iterator[Batch], firing: float) -> None:
    """Turn the free slots of a new dictionary towards the rows of `batches`, as many as there are slots.

    firing: share of the rows of a batch on which a slot is active then. Called on all ranks, each with its share of the
    rows; the slots do not depend on how rows are shared out.
    """
    dictionary, topology = strategy.objective.dictionary, strategy.topology
    for number, slots in enumerate(dictionary.form.bank_sizes):
        unit = bank_unit(number)
        directions, x = _directions(strategy, batches, slots)
        state = strategy.read(unit, everywhere=True)
        if state is not None:
            for name in ("W_enc", "W_dec"):
                weights = state.weights[name][: len(directions)]
                mixed = F.normalize(ROW * directions + RANDOM * F.normalize(weights, dim=1), dim=1)
                weights.copy_(mixed * weights.norm(dim=1, keepdim=True))
            state.weights["b_enc"].copy_(firing_biases(state.weights["W_enc"], x, firing, topology))
            strategy.write(unit, state)


def firing_biases(encoder: Tensor, x: Tensor, share: float, topology: Topology) -> Tensor:
    """b_enc [m] on the host at which encoder rows [m, D] are active on this share of the rows of the global batch, x
    [B, D] of this rank; on one at least."""
    parts = []
    for rows in encoder.split(CHUNK):
        pre, _ = topology.gather_over_data(x @ rows.to(x.device).T)
        active = max(1, round(share * len(pre)))
        # Between the last row that is to be active and the next one.
        top = pre.topk(min(active + 1, len(pre)), dim=0).values.cpu()
        parts.append(-(top[active - 1] + top[-1]) / 2 if len(top) > active else -top[-1] / 2)
    return torch.cat(parts)


def _directions(strategy: Strategy, batches: Iterator[Batch], slots: int) -> tuple[Tensor, Tensor]:
    """The next rows of the global batches at norm 1 [n, D], on the host of every rank, fewer where most are masked; and
    the normalised rows [B, D] of this rank's last batch."""
    topology, found = strategy.topology, []
    missing, x = slots, torch.empty(0)
    for _ in range(slots):
        batch = next(batches)
        x = strategy.objective.dictionary.normalise(batch.acts[batch.valid].to(topology.device))
        rows, _ = topology.gather_over_data(x)
        found.append(F.normalize(rows[rows.norm(dim=1) > 0][:missing], dim=1).cpu())
        missing -= len(found[-1])
        if not missing and len(rows):
            break
    return torch.cat(found), x
