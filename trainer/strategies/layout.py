"""How the work is spread over the launched processes: the section `parallel`, and what it comes to for one launch."""

from dataclasses import dataclass, replace

from trainer.errors import UserError
from trainer.strategies.deepspeed_settings import offloads, read_tuning
from trainer.strategies.launch_file import LaunchFile, launch_file
from trainer.topology import check_mesh

LONGEST_TIMEOUT = 30 * 24 * 3600
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "dictionary")


@dataclass(frozen=True)
class Layout:
    """What a launch runs under.

    strategy: one of STRATEGIES. dictionary_ranks: ranks that share the free banks; the others see other rows. offload:
        ZeRO
    optimizer state in host memory. deepspeed: file that tunes ZeRO, or "". timeout: seconds that a rank waits for the
    others.
    """

    strategy: str
    dictionary_ranks: int = 1
    offload: bool = False
    deepspeed: str = ""
    timeout: float = 600.0

    @property
    def zero_stage(self) -> int:
        """ZeRO stage; 0 = not ZeRO."""
        return int(self.strategy.removeprefix("zero")) if self.strategy.startswith("zero") else 0


@dataclass
class ParallelConfig:
    """How the work is spread over the launched processes."""

    strategy: str = "auto"  # auto: what the launch file says, or single / ddp by the number of processes
    dictionary_ranks: int = 1  # ranks that share the free banks; the others see other rows
    offload: bool = False  # ZeRO optimizer state in host memory
    deepspeed: str = ""  # JSON file that tunes ZeRO, see launch/deepspeed; "": settings computed from the banks alone
    timeout: float = 600.0  # seconds that a rank waits for the others before the job fails

    def validate(self) -> None:
        """Raise UserError for a word or number that cannot be."""
        if self.strategy not in ("auto", *STRATEGIES):
            raise UserError(f"parallel.strategy={self.strategy!r} is unknown; use one of auto, {', '.join(STRATEGIES)}")
        if not 0.001 <= self.timeout <= LONGEST_TIMEOUT:
            raise UserError(f"parallel.timeout={self.timeout} must be between 0.001 and {LONGEST_TIMEOUT} seconds")
        if not 1 <= self.dictionary_ranks <= 1 << 20:
            raise UserError(f"parallel.dictionary_ranks={self.dictionary_ranks} must be between 1 and {1 << 20}")

    def resolve(self, world: int, banks: int) -> Layout:
        """The layout of `world` launched processes and `banks` free banks. Raises UserError for what cannot be."""
        self.validate()
        launch = launch_file()
        strategy, ranks = self._choose(launch, world)
        if launch.strategy and launch.strategy != strategy:
            raise UserError(
                f"parallel.strategy={strategy}, but the launch file starts {launch.strategy}; "
                f"set parallel.strategy=auto or take another file of launch/accelerate"
            )
        _check_ranks(strategy, ranks, world, banks)
        zero = strategy.startswith("zero")
        for setting, given, off in (
            ("parallel.offload=true", self.offload, "parallel.offload=false"),
            (f"parallel.deepspeed={self.deepspeed}", self.deepspeed, "parallel.deepspeed="),
        ):
            if given and not zero:
                raise UserError(
                    f"{setting} needs parallel.strategy=zero1, zero2 or zero3, not {strategy}; "
                    f"set {off} or parallel.strategy=zero3"
                )
        layout = Layout(strategy, ranks, self.offload or (launch.offload and zero), self.deepspeed, self.timeout)
        tuning = read_tuning(self.deepspeed, layout.zero_stage)
        if "offload_optimizer" in tuning:
            layout = replace(layout, offload=offloads("offload_optimizer", tuning))
        return layout

    def _choose(self, launch: LaunchFile, world: int) -> tuple[str, int]:
        """Strategy and dictionary ranks, of configuration and launch file together."""
        strategy, ranks = self.strategy, self.dictionary_ranks
        if strategy in ("auto", "dictionary") and ranks == 1:
            ranks = launch.dictionary_ranks
        if strategy == "dictionary" and ranks == 1:
            ranks = world
        if strategy == "auto":
            strategy = launch.strategy or ("dictionary" if ranks > 1 else "ddp" if world > 1 else "single")
        return strategy, ranks


def _check_ranks(strategy: str, ranks: int, world: int, banks: int) -> None:
    """Raise UserError unless `world` processes can work under a strategy with these dictionary ranks."""
    check_mesh(world, ranks)
    if strategy == "single" and world > 1:
        raise UserError(
            f"parallel.strategy=single with {world} launched processes; set parallel.strategy=ddp or launch one process"
        )
    if ranks > 1 and strategy != "dictionary":
        raise UserError(
            f"parallel.dictionary_ranks={ranks} needs parallel.strategy=dictionary, not {strategy}; "
            f"set parallel.dictionary_ranks=1 or parallel.strategy=dictionary"
        )
    if ranks > banks:
        nearest = max(n for n in range(1, banks + 1) if world % n == 0)
        raise UserError(
            f"parallel.dictionary_ranks={ranks} is more than the {banks} free banks; the nearest possible setting is "
            f"parallel.dictionary_ranks={nearest}, or lower dictionary.bank_slots"
        )
