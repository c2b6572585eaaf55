"""What the loop asks of a strategy: wrap objective and optimizer, run them, and name their state without naming
ranks."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from trainer.losses import LossWeights
from trainer.objective import AlignObjective
from trainer.optimizer import OptimConfig
from trainer.sums import MicroBatch
from trainer.topology import Topology


@dataclass
class UnitState:
    """Everything of one unit (ConceptDictionary.units) that training changes, as whole tensors on the host.

    weights: parameter and buffer name -> tensor; exp_avg, exp_avg_sq: parameter name -> tensor (fp32, or bf16 with
        optim.state=bf16), of the parameters that learn.
    """

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


class Strategy(ABC):
    """One way to spread training over ranks.

    All methods but those of one rank's data are called on all ranks, in the same order.
    """

    topology: Topology
    objective: AlignObjective

    def place(self, unit: nn.Module) -> None:
        """Bring a unit (ConceptDictionary.units) with its weights loaded to where this strategy holds them.

        Before `prepare`, unit by unit.
        """
        unit.to(self.topology.device)

    @abstractmethod
    def prepare(self, objective: AlignObjective, optim: OptimConfig, updates: int) -> None:
        """Take the objective, whose units were placed, and build engine and optimizer; `updates` steps were taken
        before."""

    @abstractmethod
    def forward(self, batch: MicroBatch, weights: LossWeights, align: bool, step: int) -> tuple[Tensor, Tensor]:
        """AlignObjective.forward through the engine."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients; `last` marks the last micro-batch of a step, after which gradients are averaged over data
        ranks."""

    @abstractmethod
    def update(self, lr: float, clip: float, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Clip by the global norm (0 = off), step, clear gradients.

        allowed: whether to, a scalar bool. Returns the norm before clipping, a scalar fp64, and whether weights were
        updated, a scalar bool: where it was allowed and the norm is finite. The norm of a step that was not allowed may
        be nan.
        """

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients of a whole step without an update: after the `last` backward, or with no gradients at
        all."""

    @abstractmethod
    def read(self, unit: str, *, everywhere: bool = False, into: UnitState | None = None) -> UnitState | None:
        """State of a unit on the one rank that is to save it, or on all ranks that hold it (`everywhere`); None on the
        others.

        into: what an earlier call returned for this unit; its memory is filled again and returned.
        """

    @abstractmethod
    def write(self, unit: str, state: UnitState) -> None:
        """Set the state of a unit on the ranks that hold it.

        Missing moments are left alone; `state` is whole on all ranks that hold the unit.
        """

    @abstractmethod
    def holds(self, unit: str) -> bool:
        """Whether this rank holds (a part of) the unit."""

    def trains(self, unit: str) -> bool:
        """Whether a unit that is held here learns; one that does not has no moments."""
        return any(parameter.requires_grad for parameter in self.objective.dictionary.units()[unit].parameters())

    def unit_names(self) -> list[str]:
        """All units of the whole dictionary, the same list on all ranks."""
        return self.objective.dictionary.form.units()

    def sync_last_fired(self) -> None:
        """Make `last_fired` of every bank that of the global batch."""
        for bank in self.objective.dictionary.free_banks():
            self.topology.max_over_data(bank.last_fired)


def on_host(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """A copy in host memory that no later step changes; in the memory of `into` where that is given, and there once a
    device has come to a late.Mark that is set after this call."""
    return tensor.detach().to("cpu", copy=True) if into is None else into.copy_(tensor.detach(), non_blocking=True)


def owned_banks(banks: int, topology: Topology) -> list[int]:
    """Indices of the free banks of a dictionary rank: runs as equal as can be; where one is longer, the last is, since
    it has the smaller bank."""
    rank, world = topology.dictionary_rank, topology.dictionary_world
    return list(range(banks * rank // world, banks * (rank + 1) // world))
