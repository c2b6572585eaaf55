"""Memory of a rank and bytes that it sends in a step, by strategy: arithmetic on the sizes of a run, held against measurements by tests/test_plan.py."""

from dataclasses import dataclass, field
from functools import cached_property

from trainer.dictionary import DictionaryConfig, bank_sizes
from trainer.strategies import owned_banks
from trainer.topology import Topology

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "dictionary")
FP32 = 4
MOST_DEVICES = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes that memory and traffic follow from. rows: of the global batch; low: products in bf16; moment: bytes of a moment of AdamW."""

    width: int
    concepts: int
    answers: int
    dictionary: DictionaryConfig
    rows: int
    low: bool
    moment: int = FP32

    @cached_property
    def bank_slots(self) -> list[int]:
        """Slots of each free bank."""
        return bank_sizes(self.dictionary.free_slots, self.dictionary.bank_slots)

    @property
    def banks(self) -> int:
        """Number of free banks."""
        return len(self.bank_slots)

    @property
    def bank(self) -> int:
        """Elements of the largest bank."""
        return max(self.bank_slots) * (2 * self.width + 1)

    @property
    def shared(self) -> int:
        """Elements that dictionary ranks replicate: concept slots, output bias, value head."""
        hidden = self.dictionary.value_hidden
        head = hidden * (self.concepts + self.answers + 1) + self.answers if self.concepts and self.answers else 0
        return self.concepts * (2 * self.width + 1) + self.width + head

    @property
    def free(self) -> int:
        """Elements of all free banks."""
        return self.dictionary.free_slots * (2 * self.width + 1)

    def activations(self, rows: int) -> int:
        """Bytes of the rows, the running reconstruction and one bank's code for `rows` rows of a rank, and of its bf16 weights."""
        return FP32 * rows * (8 * self.width + max(self.bank_slots)) + (2 * self.bank if self.low else 0)


@dataclass
class Estimate:
    """One strategy on `devices` ranks: peak bytes of a rank by what they are for, and bytes that it sends in a step by where they go."""

    strategy: str
    devices: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    build: int  # until the engine is built, before the first step
    snapshot: int = 0  # copies in host memory that an asynchronous save writes from, kept for the next one
    host_is_device: bool = False  # host memory counts, as on CPU ranks
    sent: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Peak bytes of a rank."""
        step = self.weights + self.gradients + self.optimizer + self.buffers + self.activations
        return max(step + (self.snapshot if self.host_is_device else 0), self.build)


def estimate(
    shape: Shape, strategy: str, devices: int, *, gloo: bool = False, offload: bool = False, snapshots: bool = False
) -> Estimate | None:
    """What a strategy needs on `devices` ranks; None where the combination cannot be.

    Args:
        gloo: CPU ranks.
        offload: ZeRO optimizer state in host memory.
        snapshots: checkpoints are saved asynchronously.
    """
    if (strategy == "single" and devices > 1) or (strategy == "dictionary" and devices > shape.banks):
        return None
    if strategy.startswith("zero") and shape.moment != FP32:  # see OptimConfig
        return None
    if strategy.startswith("zero"):
        found = _zero(shape, strategy, devices, gloo, offload)
    elif strategy == "dictionary":
        found = _local(shape, strategy, 1, devices)
    else:
        found = _local(shape, strategy, devices, 1)
    found.host_is_device = gloo
    found.snapshot = _snapshot(shape, devices) if snapshots else 0
    return found


def _snapshot(shape: Shape, ranks: int) -> int:
    """Weights and two moments of the units that the busiest of the ranks saves: units are spread evenly, whatever the strategy."""
    elements = min(-(-shape.banks // ranks) * shape.bank + shape.shared, shape.free + shape.shared)
    return (FP32 + 2 * shape.moment) * elements


def _local(shape: Shape, strategy: str, data: int, dictionary: int) -> Estimate:
    places = [Topology(dictionary_rank=rank, dictionary_world=dictionary) for rank in range(dictionary)]
    most = max(sum(shape.bank_slots[i] for i in owned_banks(shape.banks, place)) for place in places)
    elements = most * (2 * shape.width + 1) + shape.shared
    rows = -(-shape.rows // data)
    sent = _correlation(shape, data)
    if data > 1:
        sent["gradients, all-reduce over data ranks"] = _ring(2 * FP32 * elements, data)
    if dictionary > 1:
        sent["reconstruction, all-reduce over dictionary ranks"] = _ring(
            2 * FP32 * rows * (shape.width + shape.concepts), dictionary
        )
    return Estimate(
        strategy,
        data * dictionary,
        weights=FP32 * elements,
        gradients=FP32 * (elements + (shape.bank if data > 1 else 0)),
        optimizer=2 * shape.moment * elements,
        buffers=0,
        activations=shape.activations(rows),
        build=((2 if data > 1 else 1) * FP32 + 2 * shape.moment) * elements,  # the buckets of DDP are its gradients
        sent=sent,
    )


def _zero(shape: Shape, strategy: str, devices: int, gloo: bool, offload: bool) -> Estimate:
    stage = int(strategy.removeprefix("zero"))
    whole, bank = FP32 * (shape.free + shape.shared), FP32 * shape.bank
    shard = -(-whole // devices)
    sent = _correlation(shape, devices)
    reduced = _ring((2 if gloo else 1) * whole, devices)
    sent["gradients, reduce-scatter"] = reduced
    sent["weights, all-gather" + (" in forward and backward" if stage == 3 else "")] = _ring(
        (2 if stage == 3 else 1) * whole, devices
    )
    masters = shard if stage < 3 or offload else 0  # stage 3: the masters are the shards
    if stage == 3:
        gathered = bank if gloo else 2 * bank  # with CUDA the next bank is fetched meanwhile
        buffers = gathered + bank + 2 * bank  # and its copy, and two buckets of gradients
    else:
        buffers = 2 * bank + (whole if gloo else 0)
    optimizer = 0 if offload else masters + 2 * shard
    # Stage 3 shards bank by bank, then come gradients and optimizer; below it there are the weights and a flat copy.
    build = max(shard + bank, 2 * shard + optimizer) if stage == 3 else 2 * whole
    return Estimate(
        strategy,
        devices,
        weights=whole if stage < 3 else shard,
        gradients=(whole if stage == 1 else 0 if stage == 2 and gloo else shard) + (bank if stage == 3 else 0),
        optimizer=optimizer,
        buffers=buffers,
        activations=shape.activations(-(-shape.rows // devices)),
        build=build,
        sent=sent,
    )


def _ring(size: int, ranks: int) -> int:
    """Bytes that a rank sends when `size` bytes go once around a ring."""
    return size * (ranks - 1) // ranks


def _correlation(shape: Shape, data: int) -> dict[str, int]:
    """The moments of every bank, reduced in forward and in backward."""
    moments = FP32 * (2 + shape.concepts) * shape.dictionary.free_slots
    return (
        {"correlation moments, all-reduce over data ranks": _ring(4 * moments, data)}
        if data > 1 and shape.concepts
        else {}
    )


def smallest(shape: Shape, strategy: str, memory: int, **how: bool) -> int | None:
    """Fewest devices (powers of two, and all banks one by one) on which a rank fits into `memory` bytes; `how` as for `estimate`."""
    counts = {2**i for i in range(MOST_DEVICES.bit_length())} | (
        {shape.banks} if shape.banks <= MOST_DEVICES else set()
    )
    for devices in sorted(counts):
        found = estimate(shape, strategy, devices, **how)
        if found is not None and found.total <= memory:
            return devices
    return None
