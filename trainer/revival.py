"""Revival of dead slots by resampling (after "Towards Monosemanticity", 2023, appendix on neuron resampling), without a
shock.

At a revival, slots that fired on no row for a while get new weights. Rows of the current global batch are drawn with
probability proportional to their squared loss, each at most once. A slot's decoder becomes the direction of what its
row lacks, x - x_hat, at norm 1; its encoder the same direction at 0.2 of the mean encoder norm of living slots; its
bias leaves it active on the rows that lie furthest along it, FIRING of the batch. Its first moment is 0 and its second
that of the living slots of its bank, since a moment of 0 under the step count of the run would make its first updates
several times the rate.

Shapes: B rows of this rank, G of the global batch, D width, m slots that are revived.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.dictionary import bank_unit
from trainer.errors import UserError
from trainer.strategies import Strategy, UnitState
from trainer.topology import Topology

ENCODER_SHARE = 0.2
FIRING = 0.005  # share of the rows of a batch on which a revived slot is active
CHUNK = 1024  # slots whose pre-activations [chunk, G] are held at a time


@dataclass
class RevivalConfig:
    """Dead slots: when a slot counts as dead, and whether it is given new weights."""

    method: str = "resample"  # resample | none
    every: int | None = None  # steps between revivals; None: a fiftieth of the run
    dead_after: int | None = None  # steps without firing; None: as `every`
    until: float = 0.8  # share of the run after which no slot is revived any more

    def validate(self) -> None:
        """Raise UserError for an unknown method or a period that cannot be."""
        if self.method not in ("resample", "none"):
            raise UserError(f"revival.method={self.method!r} is unknown; use resample or none")
        for name in ("every", "dead_after"):
            steps = getattr(self, name)
            if steps is not None and not 1 <= steps <= 1 << 50:
                raise UserError(f"revival.{name}={steps} must be between 1 and {1 << 50}")
        if not 0 <= self.until <= 1:
            raise UserError(f"revival.until={self.until} must be between 0 and 1")

    def period(self, total: int) -> int:
        """Steps between revivals in a run of `total`."""
        return self.every if self.every is not None else max(1, total // 50)

    def patience(self, total: int) -> int:
        """Steps without firing after which a slot counts as dead in a run of `total`."""
        return self.dead_after if self.dead_after is not None else self.period(total)

    def due(self, step: int, total: int) -> bool:
        """Whether slots are revived right before step `step` of `total`."""
        return self.method == "resample" and 0 < step <= total * self.until and step % self.period(total) == 0


def count_dead(strategy: Strategy, step: int, dead_after: int) -> int:
    """Free slots of the whole dictionary that fired on no row of the last `dead_after` steps. Called on all ranks."""
    strategy.sync_last_fired()
    dead = [_dead(bank.last_fired, step, dead_after).sum() for bank in strategy.objective.dictionary.free_banks()]
    return int(strategy.topology.sum_over_dictionary(torch.stack(dead).sum()).item())


def resample(strategy: Strategy, acts: Tensor, align: bool, step: int, dead_after: int, seed: int) -> int:
    """Give dead slots new weights from the rows acts [B, D] (this rank's share of the global batch).

    Returns how many; at most as many as there are different rows that lack something. Called on all ranks.
    """
    strategy.sync_last_fired()
    counts, norm = _dead_counts(strategy, step, dead_after)
    dead = int(counts.sum())
    if not dead:
        return 0
    topology = strategy.topology
    x, x_hat = strategy.objective.reconstruct(acts, align)
    residual = x - x_hat
    weights, first = _gather(residual.double().square().sum(dim=1).square(), topology)
    most = min(dead, int((weights > 0).sum()))
    if not most:
        return 0
    generator = torch.Generator().manual_seed(_mixed(seed, step))
    picks = torch.multinomial(weights.cpu(), most, generator=generator)
    directions = _different(_directions(residual, picks - first, topology))
    biases = _biases(directions * (ENCODER_SHARE * norm), x, topology)
    chosen = torch.randperm(dead, generator=generator)[: len(directions)].sort().values
    start = 0
    for number, count in enumerate(counts.tolist()):
        places = chosen[(chosen >= start) & (chosen < start + count)] - start
        if len(places):
            begin = int((chosen < start).sum())
            rows = slice(begin, begin + len(places))
            _revive_bank(strategy, number, places, directions[rows], biases[rows], (norm, step, dead_after))
        start += count
    return len(directions)


def _mixed(seed: int, step: int) -> int:
    """A seed that no other use of `seed` has: initialisation adds small numbers to a multiple of it."""
    return (seed * 1_000_003 + (step + 1) * 0x9E3779B97F4A7C15) % 2**63


def _dead(last_fired: Tensor, step: int, dead_after: int) -> Tensor:
    return last_fired <= step - dead_after


def _gather(mine: Tensor, topology: Topology) -> tuple[Tensor, int]:
    """Rows [G, ...] of all data ranks, in the order of the ranks (which is that of the lanes), and where this rank's
    [B, ...] begin."""
    sizes = torch.zeros(topology.data_world, dtype=torch.int64, device=mine.device)
    sizes[topology.data_rank] = len(mine)
    sizes = topology.sum_over_data(sizes)
    first = int(sizes[: topology.data_rank].sum())
    everyone = mine.new_zeros(int(sizes.sum()), *mine.shape[1:])
    everyone[first : first + len(mine)] = mine
    return topology.sum_over_data(everyone), first


def _directions(residual: Tensor, picks: Tensor, topology: Topology) -> Tensor:
    """The picked residuals at norm 1 [m, D], on the host of every rank; picks count from this rank's first row."""
    picks = picks.to(residual.device)
    mine = (picks >= 0) & (picks < len(residual))
    rows = torch.zeros(len(picks), residual.shape[1], device=residual.device)
    rows[mine] = residual[picks[mine]]
    rows = topology.sum_over_data(rows).cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _different(rows: Tensor) -> Tensor:
    """The rows without repetitions, in their order: rows of the data may be equal, slots must not start alike."""
    _, place = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(rows)).scatter_reduce(0, place, torch.arange(len(rows)), "amin")
    return rows[first.sort().values]


def _biases(encoder: Tensor, x: Tensor, topology: Topology) -> Tensor:
    """b_enc [m] on the host at which encoder rows [m, D] are active on FIRING of the rows of the global batch."""
    parts = []
    for rows in encoder.split(CHUNK):
        pre, _ = _gather(x @ rows.to(x.device).T, topology)
        active = max(1, round(FIRING * len(pre)))
        # Between the last row that is to be active and the next one.
        top = pre.topk(min(active + 1, len(pre)), dim=0).values.cpu()
        parts.append(-(top[active - 1] + top[-1]) / 2 if len(top) > active else -top[-1] / 2)
    return torch.cat(parts)


def _dead_counts(strategy: Strategy, step: int, dead_after: int) -> tuple[Tensor, float]:
    """Dead slots of every free bank, int64 [banks], and the mean encoder norm of living slots; of the whole
    dictionary."""
    dictionary, topology = strategy.objective.dictionary, strategy.topology
    figures = torch.zeros(dictionary.form.banks + 2, dtype=torch.float64, device=topology.device)
    for number, bank in zip(dictionary.owned, dictionary.free_banks(), strict=True):
        dead = _dead(bank.last_fired, step, dead_after)
        norms = bank(lambda weights: weights.W_enc.detach().norm(dim=1))
        figures[number] = dead.sum()
        figures[-2] += norms[~dead].double().sum()
        figures[-1] += (~dead).sum()
    topology.sum_over_dictionary(figures)
    norm = float(figures[-2] / figures[-1]) if figures[-1] else 1.0
    return figures[:-2].round().long().cpu(), norm


def _revive_bank(
    strategy: Strategy,
    number: int,
    places: Tensor,
    directions: Tensor,
    biases: Tensor,
    now: tuple[float, int, int],
) -> None:
    """New weights for some dead slots of one bank.

    places [m] among its dead slots; directions [m, D]; biases [m]; now: encoder norm of the living, step, dead_after.
    """
    norm, step, dead_after = now
    unit = bank_unit(number)
    state = strategy.read(unit, everywhere=True)
    if state is None:
        return
    dead = _dead(state.weights["last_fired"], step, dead_after)
    slots = dead.nonzero()[:, 0][places]
    state.weights["W_dec"][slots] = directions
    state.weights["W_enc"][slots] = directions * (ENCODER_SHARE * norm)
    state.weights["b_enc"][slots] = biases
    state.weights["last_fired"][slots] = step  # a new slot gets its time to fire
    state.weights["dependence"][slots] = 1.0
    _new_moments(state, slots, ~dead)
    strategy.write(unit, state)


def _new_moments(state: UnitState, slots: Tensor, living: Tensor) -> None:
    for tensor in state.exp_avg.values():
        tensor[slots] = 0.0
    if bool(living.any()):
        for tensor in state.exp_avg_sq.values():
            tensor[slots] = tensor[living].float().mean(dim=0).to(tensor.dtype)
