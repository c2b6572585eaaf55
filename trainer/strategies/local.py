"""Strategies in which a rank holds whole banks: single, ddp (all banks, other rows) and dictionary (some banks, all or
other rows).

They are one thing: DistributedDataParallel over the data group, if that has more than one member. Parameters that
dictionary ranks replicate get the same gradient on each of them, since the partial reconstructions are summed before
the loss.
"""

import math
import warnings
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.dictionary import bank_number
from trainer.losses import LossWeights
from trainer.objective import AlignObjective
from trainer.optimizer import MOMENTS, OptimConfig, build_optimizer, square_norm
from trainer.strategies.base import Strategy, UnitState, on_host
from trainer.sums import MicroBatch
from trainer.topology import Topology


class LocalStrategy(Strategy):
    """See the module's text."""

    def __init__(self, topology: Topology):
        self.topology = topology

    def prepare(self, objective: AlignObjective, optim: OptimConfig, updates: int) -> None:
        self.objective = objective
        self._units = objective.dictionary.units()
        learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(learning, optim)
        for parameter in learning:
            self.optimizer.make_state(parameter, updates)
        self._one = torch.ones((), device=self.topology.device)
        self.engine: nn.Module = objective
        if self.topology.data_world > 1:
            # Its replacement is not there yet: buffers would still be sent around at the start.
            warnings.filterwarnings("ignore", message=".broadcast_buffers. is deprecated", category=FutureWarning)
            self.engine = DistributedDataParallel(
                objective,
                process_group=self.topology.data_group,
                broadcast_buffers=False,  # last_fired differs by rank until it is reduced
                gradient_as_bucket_view=True,
            )
            self._fix_buckets()

    def _fix_buckets(self) -> None:
        """A first backward pass, on no rows, that is the same in every run.

        DDP lays its buckets out anew after the first one, in the order in which gradients came, and sums over more than
        two ranks depend on the layout: without this a run that resumes in another stage would not end bitwise where an
        undisturbed one ends.
        """
        device = self.topology.device
        concept, answer = (torch.zeros(*shape, dtype=torch.int64, device=device) for shape in ((0, 1), (0,)))
        acts = torch.zeros(0, self.objective.dictionary.width, device=device)
        loss, _ = self.forward(
            MicroBatch(acts, concept, answer, torch.zeros(3, device=device)), LossWeights(), False, 0
        )
        self.backward(loss, last=True)
        self.discard()

    def forward(self, batch: MicroBatch, weights: LossWeights, align: bool, step: int) -> tuple[Tensor, Tensor]:
        return self.engine(batch, weights, align, step)

    def backward(self, loss: Tensor, last: bool) -> None:
        wait = self.engine.no_sync() if isinstance(self.engine, DistributedDataParallel) and not last else nullcontext()
        with wait:
            loss.backward(self._one)

    def update(self, lr: float, clip: float, allowed: Tensor) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.topology.lag:  # nothing may wait for the device: it decides
            norm = self._global_norm()
            made = allowed & (norm < math.inf)
            divisor = self._one
            if clip > 0:
                divisor = torch.add(norm, 1e-6, out=torch.empty_like(self._one)).div_(clip).clamp_min_(1.0)
            self.optimizer.step_where(made, divisor)
        else:
            norm = self._global_norm() if allowed else torch.tensor(math.nan, dtype=torch.float64)
            made = torch.isfinite(norm)
            if made:
                self.optimizer.step(grad_scale=min(1.0, clip / (float(norm) + 1e-6)) if clip > 0 else 1.0)
        self.discard()
        return norm, made

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _global_norm(self) -> Tensor:
        """Norm over all parameters of the whole dictionary, replicated ones counted once."""
        dictionary, wait = self.objective.dictionary, not self.topology.lag
        own = [p.grad for bank in dictionary.free_banks() for p in bank.parameters() if p.grad is not None]
        shared = [p.grad for u in dictionary.shared_units().values() for p in u.parameters() if p.grad is not None]
        if self.topology.dictionary_group is None:
            return square_norm([*own, *shared], wait).sqrt()
        square = self.topology.sum_over_dictionary(square_norm(own, wait))
        return (square + square_norm(shared, wait)).sqrt()

    def read(self, unit: str, *, everywhere: bool = False, into: UnitState | None = None) -> UnitState | None:
        if not self.holds(unit) or not (everywhere or self._saves(unit)):
            return None
        module = self._units[unit]
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        old = into or UnitState({}, {}, {})
        moments = {
            key: {n: on_host(self.optimizer.state[p][key], getattr(old, key).get(n)) for n, p in parameters.items()}
            for key in MOMENTS
        }
        weights = {name: on_host(t, old.weights.get(name)) for name, t in module.state_dict().items()}
        return UnitState(weights, moments["exp_avg"], moments["exp_avg_sq"])

    def write(self, unit: str, state: UnitState) -> None:
        if not self.holds(unit):
            return
        module = self._units[unit]
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if name in state.weights:
                    tensor.copy_(state.weights[name])
            for name, parameter in module.named_parameters():
                slot = self.optimizer.state.get(parameter, {})  # empty for one that does not learn
                for key in MOMENTS:
                    if name in (moments := getattr(state, key)):
                        slot[key].copy_(moments[name])

    def holds(self, unit: str) -> bool:
        return unit in self._units

    def _saves(self, unit: str) -> bool:
        """Spread the units of a dictionary rank over its data ranks, so that they write at the same time."""
        topology = self.topology
        number = bank_number(unit)
        return topology.is_main if number is None else number % topology.data_world == topology.data_rank
