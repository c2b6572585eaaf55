"""Revival of dead slots by resampling ("Towards Monosemanticity", 2023, appendix on neuron resampling).

Every `every` steps, slots that fired on no row for `dead_after` steps get new weights: rows of the current global batch are drawn with
probability proportional to their squared loss; a slot's decoder becomes the row's direction at norm 1, its encoder the same direction at 0.2 of the
mean encoder norm of living slots, its bias 0, its optimizer moments 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.dictionary import bank_unit
from trainer.errors import UserError
from trainer.strategies import Strategy
from trainer.topology import Topology

ENCODER_SHARE = 0.2


@dataclass
class RevivalConfig:
    """Dead slots: when a slot counts as dead, and whether it is given new weights."""

    method: str = "resample"  # resample | none
    every: int = 500  # steps between revivals
    dead_after: int = 250  # steps without firing
    until: float = 0.5  # share of the run after which no slot is revived any more

    def validate(self) -> None:
        """Raise UserError for an unknown method or a period that cannot be."""
        if self.method not in ("resample", "none"):
            raise UserError(f"revival.method={self.method!r} is unknown; use resample or none")
        for name in ("every", "dead_after"):
            if not 1 <= getattr(self, name) <= 1 << 50:
                raise UserError(f"revival.{name}={getattr(self, name)} must be between 1 and {1 << 50}")
        if not 0 <= self.until <= 1:
            raise UserError(f"revival.until={self.until} must be a share of the run, between 0 and 1")

    def due(self, step: int, total: int) -> bool:
        """Whether slots are revived right before step `step` of `total`."""
        return self.method == "resample" and 0 < step <= total * self.until and step % self.every == 0


def count_dead(strategy: Strategy, step: int, dead_after: int) -> int:
    """Free slots of the whole dictionary that fired on no row of the last `dead_after` steps. Called on all ranks."""
    strategy.sync_last_fired()
    dead = [_dead(bank.last_fired, step, dead_after).sum() for bank in strategy.objective.dictionary.free_banks()]
    return int(strategy.topology.sum_over_dictionary(torch.stack(dead).sum()).item())


def resample(strategy: Strategy, acts: Tensor, align: bool, step: int, dead_after: int, seed: int) -> int:
    """Give the dead slots new weights from the rows acts [B, D] (this rank's share of the global batch). Returns how many. Called on all ranks."""
    strategy.sync_last_fired()
    counts, norm = _dead_counts(strategy, step, dead_after)
    dead = int(counts.sum())
    if not dead:
        return 0
    topology = strategy.topology
    x, x_hat = strategy.objective.reconstruct(acts, align)
    first, weights = _global_weights((x - x_hat).square().sum(dim=1).square(), topology)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    directions = _directions(x, _draw(weights, dead, generator) - first, topology)
    for index, rows in enumerate(directions.split(counts.tolist())):
        if len(rows):
            _revive_bank(strategy, index, rows, norm, step, dead_after)
    return dead


def _dead(last_fired: Tensor, step: int, dead_after: int) -> Tensor:
    return last_fired <= step - dead_after


def _global_weights(mine: Tensor, topology: Topology) -> tuple[int, Tensor]:
    """Weights [G] fp64 of the rows of all data ranks, in the order of the ranks (which is that of the lanes), and the place of this rank's first."""
    sizes = torch.zeros(topology.data_world, dtype=torch.int64, device=mine.device)
    sizes[topology.data_rank] = len(mine)
    sizes = topology.sum_over_data(sizes)
    first = int(sizes[: topology.data_rank].sum())
    everyone = torch.zeros(int(sizes.sum()), dtype=torch.float64, device=mine.device)
    everyone[first : first + len(mine)] = mine.double()
    return first, topology.sum_over_data(everyone).cpu()


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` row numbers, drawn by weight; they repeat only when there are fewer rows."""
    picks = []
    while count > 0:
        take = min(count, len(weights))
        picks.append(torch.multinomial(weights.clamp_min(1e-30), take, replacement=False, generator=generator))
        count -= take
    return torch.cat(picks)


def _directions(x: Tensor, picks: Tensor, topology: Topology) -> Tensor:
    """The picked rows at norm 1, on the host of every rank; picks count from this rank's first row."""
    picks = picks.to(x.device)
    mine = (picks >= 0) & (picks < len(x))
    rows = torch.zeros(len(picks), x.shape[1], device=x.device)
    rows[mine] = x[picks[mine]]
    rows = topology.sum_over_data(rows).cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _dead_counts(strategy: Strategy, step: int, dead_after: int) -> tuple[Tensor, float]:
    """Dead slots of every free bank, int64 [banks], and the mean encoder norm of living slots; of the whole dictionary."""
    dictionary, topology = strategy.objective.dictionary, strategy.topology
    figures = torch.zeros(dictionary.form.banks + 2, dtype=torch.float64, device=topology.device)
    for index, bank in zip(dictionary.owned, dictionary.free_banks(), strict=True):
        dead = _dead(bank.last_fired, step, dead_after)
        norms = bank(lambda weights: weights.W_enc.detach().norm(dim=1))
        figures[index] = dead.sum()
        figures[-2] += norms[~dead].double().sum()
        figures[-1] += (~dead).sum()
    topology.sum_over_dictionary(figures)
    norm = float(figures[-2] / figures[-1]) if figures[-1] else 1.0
    return figures[:-2].round().long().cpu(), norm


def _revive_bank(strategy: Strategy, index: int, rows: Tensor, norm: float, step: int, dead_after: int) -> None:
    """rows [dead, D] are the new directions of the dead slots of one bank."""
    unit = bank_unit(index)
    state = strategy.read(unit, everywhere=True)
    if state is None:
        return
    dead = _dead(state.weights["last_fired"], step, dead_after)
    state.weights["W_dec"][dead] = rows
    state.weights["W_enc"][dead] = rows * (ENCODER_SHARE * norm)
    state.weights["b_enc"][dead] = 0.0
    state.weights["last_fired"][dead] = step  # a new slot gets its time to fire
    for moments in (state.exp_avg, state.exp_avg_sq):
        for tensor in moments.values():
            tensor[dead] = 0.0
    strategy.write(unit, state)
