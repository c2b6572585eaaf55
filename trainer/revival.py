"""Revival of dead slots by resampling (after "Towards Monosemanticity", 2023, appendix on neuron resampling), without a
shock.

At a revival, slots that fired on no row for a while get new weights. Rows of the current global batch are drawn with
probability proportional to their squared loss, each at most once. A slot's decoder becomes the direction of what its
row lacks, x - x_hat, at norm 1; its encoder the same direction at 0.2 of the mean encoder norm of living slots; its
bias leaves it active on the rows that lie furthest along it, FIRING of the batch. Its first moment is 0 and its second
that of the living slots of its bank, since a moment of 0 under the step count of the run would make its first updates
several times the rate.

Where rows lack the same, new slots lie along each other and fire on the same rows, and many of them would put there a
multiple of what is lacking. So no more are revived at a time than leave the reconstruction of the batch no worse.

Shapes: B rows of this rank, G of the global batch, D width, m slots that are revived.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.beginning import CHUNK, firing_biases
from trainer.dictionary import GATES, BankWeights, bank_unit
from trainer.errors import UserError
from trainer.following import dead_slots
from trainer.strategies import Strategy, UnitState
from trainer.topology import Topology

ENCODER_SHARE = 0.2
FIRING = 0.005  # share of the rows of a batch on which a revived slot is active
LEAST_PERIOD = 25  # steps; in fewer a new slot has no time to find its place, and one that is rare counts as dead


@dataclass
class RevivalConfig:
    """Dead slots: when a slot counts as dead, and whether it is given new weights."""

    method: str = "resample"  # resample | none
    every: int | None = None  # steps between revivals; None: a fiftieth of the run, at least 25
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
        return self.every if self.every is not None else max(LEAST_PERIOD, total // 50)

    def patience(self, total: int) -> int:
        """Steps without firing after which a slot counts as dead in a run of `total`."""
        return self.dead_after if self.dead_after is not None else self.period(total)

    def due(self, step: int, total: int) -> bool:
        """Whether slots are revived right before step `step` of `total`."""
        return self.method == "resample" and 0 < step <= total * self.until and step % self.period(total) == 0


def count_dead(strategy: Strategy, step: int, dead_after: int) -> int:
    """Free slots of the whole dictionary that fired on no row of the last `dead_after` steps. Called on all ranks."""
    strategy.sync_last_fired()
    dead = [dead_slots(bank.last_fired, step, dead_after).sum() for bank in strategy.objective.dictionary.free_banks()]
    return int(strategy.topology.sum_over_dictionary(torch.stack(dead).sum()).item())


def resample(strategy: Strategy, acts: Tensor, align: bool, step: int, dead_after: int, seed: int) -> int:
    """Give dead slots new weights from the rows acts [B, D] (this rank's share of the global batch).

    Returns how many; at most as many as there are different rows that lack something, and as leave the reconstruction
    of these rows no worse. Called on all ranks.
    """
    strategy.sync_last_fired()
    counts, norm, threshold = _dead_counts(strategy, step, dead_after)
    dead = int(counts.sum())
    if not dead:
        return 0
    topology = strategy.topology
    look = strategy.objective.look(acts, align)
    x, residual = look.x, look.x - look.x_hat
    weights, first = topology.gather_over_data(residual.double().square().sum(dim=1).square())
    most = min(dead, int((weights > 0).sum()))
    if not most:
        return 0
    generator = torch.Generator().manual_seed(_mixed(seed, step))
    picks = torch.multinomial(weights.cpu(), most, generator=generator)
    directions = _different(_directions(residual, picks - first, topology))
    biases = firing_biases(directions * (ENCODER_SHARE * norm), x, FIRING, topology)
    fitting = _fitting(directions, biases, Reading(x, residual, ENCODER_SHARE * norm, threshold), topology)
    directions, biases = directions[:fitting], biases[:fitting]
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


@dataclass(frozen=True)
class Reading:
    """How new slots see rows: x [B, D] and residual [B, D] of this rank's rows; norm of their encoder rows, threshold
    of their gate."""

    x: Tensor
    residual: Tensor
    norm: float
    threshold: float


def _fitting(directions: Tensor, biases: Tensor, reading: Reading, topology: Topology) -> int:
    """How many of the new slots [m, D], in their order, can fire together: the most of 1, 2, 4 ... and m with which the
    squared residual of the global batch is not above what it is without."""
    most = len(directions)
    counts = sorted({most, *(1 << i for i in range(most.bit_length()))})
    residual, errors, begin = reading.residual, [], 0
    for count in counts:
        for part in range(begin, count, CHUNK):
            chosen = slice(part, min(part + CHUNK, count))
            rows = directions[chosen].to(residual.device)
            pre = reading.norm * (reading.x @ rows.T) + biases[chosen].to(residual.device)
            residual = residual - torch.where(pre > 0, pre + reading.threshold, 0.0) @ rows
        errors.append(residual.double().square().sum())
        begin = count
    before = reading.residual.double().square().sum()
    before, *after = topology.sum_over_data(torch.stack([before, *errors])).tolist()
    return max((count for count, error in zip(counts, after, strict=True) if error <= before), default=0)


def _dead_counts(strategy: Strategy, step: int, dead_after: int) -> tuple[Tensor, float, float]:
    """Dead slots of every free bank, int64 [banks], and the mean encoder norm and threshold of living slots; of the
    whole dictionary."""
    dictionary, topology = strategy.objective.dictionary, strategy.topology
    figures = torch.zeros(dictionary.form.banks + 3, dtype=torch.float64, device=topology.device)
    for number, bank in zip(dictionary.owned, dictionary.free_banks(), strict=True):
        living = ~dead_slots(bank.last_fired, step, dead_after)
        norms, thresholds = bank(_norms_and_thresholds)
        figures[number] = (~living).sum()
        figures[-3] += norms[living].double().sum()
        figures[-2] += thresholds[living].double().sum()
        figures[-1] += living.sum()
    topology.sum_over_dictionary(figures)
    norm, threshold = (figures[-3:-1] / figures[-1]).tolist() if figures[-1] else (1.0, 0.0)
    return figures[:-3].round().long().cpu(), norm, threshold


def _norms_and_thresholds(weights: BankWeights) -> tuple[Tensor, Tensor]:
    threshold = torch.zeros_like(weights.b_enc) if weights.threshold is None else weights.threshold
    return weights.W_enc.detach().norm(dim=1), threshold.detach().expand_as(weights.b_enc)


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
    dead = dead_slots(state.weights["last_fired"], step, dead_after)
    slots = dead.nonzero()[:, 0][places]
    state.weights["W_dec"][slots] = directions
    state.weights["W_enc"][slots] = directions * (ENCODER_SHARE * norm)
    gate = GATES[strategy.objective.dictionary.form.gate]
    state.weights["b_enc"][slots] = biases + gate.renew(state.weights, slots, ~dead)
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
