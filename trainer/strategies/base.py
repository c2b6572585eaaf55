"""What the loop asks of a strategy: wrap objective and optimizer, run them, and name their state without naming ranks."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor, nn

from trainer.errors import UserError
from trainer.losses import LossConfig
from trainer.objective import AlignObjective, Rows
from trainer.optimizer import OptimConfig
from trainer.strategies.deepspeed_settings import offloads, read_tuning
from trainer.topology import Topology, check_mesh, launch_file

STRATEGIES = ("auto", "single", "ddp", "dictionary", "zero1", "zero2", "zero3")


@dataclass
class ParallelConfig:
    """How the work is spread over the launched processes."""

    strategy: str = "auto"  # auto: what the launch file says, or single / ddp by the number of processes
    dictionary_ranks: int = 1  # ranks that share the free banks; the others see other rows
    offload: bool = False  # ZeRO optimizer state in host memory
    deepspeed: str = ""  # JSON file that tunes ZeRO, see launch/deepspeed; "": settings computed from the banks alone
    timeout: float = 600.0  # seconds that a rank waits for the others before the job fails

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of a resolved configuration; 0 = not ZeRO."""
        return int(self.strategy.removeprefix("zero")) if self.strategy.startswith("zero") else 0

    def resolve(self, world: int, banks: int) -> "ParallelConfig":
        """The setting for `world` launched processes and `banks` free banks. Raises UserError for what cannot be."""
        if self.strategy not in STRATEGIES:
            raise UserError(f"parallel.strategy={self.strategy!r} is unknown; use one of {', '.join(STRATEGIES)}")
        if self.timeout <= 0:
            raise UserError(f"parallel.timeout={self.timeout} must be above 0 seconds")
        launch = launch_file()
        name, ranks = self.strategy, self.dictionary_ranks
        if name in ("auto", "dictionary") and ranks == 1:
            ranks = launch.dictionary_ranks
        if name == "dictionary" and ranks == 1:
            ranks = world
        if name == "auto":
            name = launch.strategy or ("dictionary" if ranks > 1 else "ddp" if world > 1 else "single")
        if launch.strategy and launch.strategy != name:
            raise UserError(
                f"parallel.strategy={name}, but the launch file starts {launch.strategy}; "
                f"set parallel.strategy=auto or take another file of launch/accelerate"
            )
        check_mesh(world, ranks)
        if name == "single" and world > 1:
            raise UserError(
                f"parallel.strategy=single with {world} launched processes; set parallel.strategy=ddp or launch one process"
            )
        if ranks > 1 and name != "dictionary":
            raise UserError(
                f"parallel.dictionary_ranks={ranks} needs parallel.strategy=dictionary, not {name}; "
                f"set parallel.dictionary_ranks=1 or parallel.strategy=dictionary"
            )
        if ranks > banks:
            nearest = max(n for n in range(1, banks + 1) if world % n == 0)
            raise UserError(
                f"parallel.dictionary_ranks={ranks} is more than the {banks} free banks; the nearest possible setting is "
                f"parallel.dictionary_ranks={nearest}, or lower dictionary.bank_slots"
            )
        offload = self.offload or (launch.offload and name.startswith("zero"))
        if offload and not name.startswith("zero"):
            raise UserError(
                f"parallel.offload=true needs parallel.strategy=zero1, zero2 or zero3, not {name}; "
                f"set parallel.offload=false or parallel.strategy=zero1"
            )
        found = replace(self, strategy=name, dictionary_ranks=ranks, offload=offload)
        if self.deepspeed and not found.zero_stage:
            raise UserError(
                f"parallel.deepspeed={self.deepspeed} needs parallel.strategy=zero1, zero2 or zero3, not {name}; "
                f"set parallel.deepspeed= or parallel.strategy=zero3"
            )
        tuning = read_tuning(self.deepspeed, found.zero_stage)
        return replace(found, offload=offloads("offload_optimizer", tuning)) if "offload_optimizer" in tuning else found


@dataclass
class UnitState:
    """Everything of one unit (ConceptDictionary.units) that training changes, as whole tensors on the host.

    weights: parameter and buffer name -> tensor; exp_avg, exp_avg_sq: parameter name -> tensor (fp32, or bf16 with optim.state=bf16).
    """

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


class Strategy(ABC):
    """One way to spread training over ranks. All methods but those of one rank's data are called on all ranks, in the same order."""

    topology: Topology
    objective: AlignObjective

    def place(self, unit: nn.Module) -> None:
        """Bring a unit (ConceptDictionary.units) with its weights loaded to where this strategy holds them. Before `prepare`, unit by unit."""
        unit.to(self.topology.device)

    @abstractmethod
    def prepare(self, objective: AlignObjective, optim: OptimConfig, updates: int) -> None:
        """Take the objective, whose units were placed, and build engine and optimizer; `updates` steps were taken before."""

    @abstractmethod
    def forward(self, rows: Rows, weights: LossConfig, align: bool, step: int) -> tuple[Tensor, Tensor]:
        """AlignObjective.forward through the engine."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients; `last` marks the last micro-batch of a step, after which gradients are averaged over data ranks."""

    @abstractmethod
    def update(self, lr: float, clip: float) -> float:
        """Clip by the global norm (0 = off), step, clear gradients. Returns the norm before clipping; a norm that is not finite updates nothing."""

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients of a whole step without an update: after the `last` backward, or with no gradients at all."""

    @abstractmethod
    def read(self, unit: str, *, everywhere: bool = False, into: UnitState | None = None) -> UnitState | None:
        """State of a unit on the one rank that is to save it, or on all ranks that hold it (`everywhere`); None on the others.

        into: what an earlier call returned for this unit; its memory is filled again and returned.
        """

    @abstractmethod
    def write(self, unit: str, state: UnitState) -> None:
        """Set the state of a unit on the ranks that hold it. Missing moments are left alone; `state` is whole on all ranks that hold the unit."""

    @abstractmethod
    def holds(self, unit: str) -> bool:
        """Whether this rank holds (a part of) the unit."""

    def unit_names(self) -> list[str]:
        """All units of the whole dictionary, the same list on all ranks."""
        dictionary = self.objective.dictionary
        fixed = [name for name in dictionary.units() if not name.startswith("bank-")]
        return fixed + [f"bank-{i:05d}" for i in range(len(dictionary.sizes))]

    def sync_last_fired(self) -> None:
        """Make `last_fired` of every bank that of the global batch."""
        for bank in self.objective.dictionary.free_banks():
            self.topology.max_over_data(bank.last_fired)


def on_host(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """A copy in host memory that no later step changes; in the memory of `into` where that is given."""
    return tensor.detach().to("cpu", copy=True) if into is None else into.copy_(tensor.detach())


def owned_banks(banks: int, topology: Topology) -> list[int]:
    """Indices of the free banks of a dictionary rank: runs as equal as can be; where one is longer, the last is, since it has the smaller bank."""
    rank, world = topology.dictionary_rank, topology.dictionary_world
    return list(range(banks * rank // world, banks * (rank + 1) // world))
