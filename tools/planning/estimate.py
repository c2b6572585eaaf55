"""Memory of a rank and bytes that it sends in a step, by strategy: arithmetic on the sizes of a run, held against
measurements by tests/test_plan.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from trainer.dictionary import DictionaryForm, bank_unit
from trainer.strategies import owned_banks
from trainer.topology import Topology

FP32 = 4
MOST_DEVICES = 8192


@dataclass(frozen=True)
class Workload:
    """What memory and traffic follow from.

    form: of the dictionary. rows: of the global batch. bf16: whether products are in bf16. moment: bytes of a moment of
        AdamW.
    """

    form: DictionaryForm
    rows: int
    bf16: bool
    moment: int = FP32

    @cached_property
    def bank(self) -> int:
        """Elements of the largest bank."""
        return self.form.elements(bank_unit(0))

    @cached_property
    def shared(self) -> int:
        """Elements that dictionary ranks replicate: concept slots, output bias, value head."""
        return sum(self.form.elements(unit) for unit in self.form.shared_units())

    def free(self, banks: Sequence[int] | None = None) -> int:
        """Elements of the free banks of these numbers, default all."""
        numbers = range(self.form.banks) if banks is None else banks
        whole = sum(1 for number in numbers if number < self.form.banks - 1)
        last = self.form.elements(bank_unit(self.form.banks - 1)) if self.form.banks - 1 in numbers else 0
        return whole * self.bank + last

    def activations(self, rows: int) -> int:
        """Bytes of the rows, the running reconstruction and one bank's code for `rows` rows of a rank, and of its bf16
        weights."""
        widest = min(self.form.bank_slots, self.form.free_slots)
        return FP32 * rows * (8 * self.form.width + widest) + (2 * self.bank if self.bf16 else 0)


@dataclass
class Estimate:
    """One strategy on `devices` ranks: peak bytes of a rank by what they are for, and bytes that it sends in a step by
    where they go."""

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
    work: Workload, strategy: str, devices: int, *, gloo: bool = False, offload: bool = False, snapshots: bool = False
) -> Estimate | None:
    """What a strategy needs on `devices` ranks; None where the combination cannot be.

    Args:
        gloo: CPU ranks.
        offload: ZeRO optimizer state in host memory.
        snapshots: checkpoints are saved asynchronously.
    """
    if (strategy == "single" and devices > 1) or (strategy == "dictionary" and devices > work.form.banks):
        return None
    if strategy.startswith("zero") and work.moment != FP32:  # see OptimConfig
        return None
    if strategy.startswith("zero"):
        found = _zero(work, strategy, devices, gloo, offload)
    elif strategy == "dictionary":
        found = _local(work, strategy, 1, devices)
    else:
        found = _local(work, strategy, devices, 1)
    found.host_is_device = gloo
    found.snapshot = _snapshot(work, devices) if snapshots else 0
    return found


def _snapshot(work: Workload, ranks: int) -> int:
    """Weights and two moments of the units that the busiest of the ranks saves: units are spread evenly, whatever the
    strategy."""
    elements = min(-(-work.form.banks // ranks) * work.bank + work.shared, work.free() + work.shared)
    return (FP32 + 2 * work.moment) * elements


def _local(work: Workload, strategy: str, data: int, dictionary: int) -> Estimate:
    places = [Topology(dictionary_rank=rank, dictionary_world=dictionary) for rank in range(dictionary)]
    elements = max(work.free(owned_banks(work.form.banks, place)) for place in places) + work.shared
    rows = -(-work.rows // data)
    sent = _correlation(work, data)
    if data > 1:
        sent["gradients, all-reduce over data ranks"] = _ring(2 * FP32 * elements, data)
    if dictionary > 1:
        sent["reconstruction, all-reduce over dictionary ranks"] = _ring(
            2 * FP32 * rows * (work.form.width + len(work.form.concepts)), dictionary
        )
    return Estimate(
        strategy,
        data * dictionary,
        weights=FP32 * elements,
        gradients=FP32 * (elements + (work.bank if data > 1 else 0)),
        optimizer=2 * work.moment * elements,
        buffers=0,
        activations=work.activations(rows),
        build=((2 if data > 1 else 1) * FP32 + 2 * work.moment) * elements,  # the buckets of DDP are its gradients
        sent=sent,
    )


def _zero(work: Workload, strategy: str, devices: int, gloo: bool, offload: bool) -> Estimate:
    stage = int(strategy.removeprefix("zero"))
    whole, bank = FP32 * (work.free() + work.shared), FP32 * work.bank
    shard = -(-whole // devices)
    sent = _correlation(work, devices)
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
        activations=work.activations(-(-work.rows // devices)),
        build=build,
        sent=sent,
    )


def _ring(size: int, ranks: int) -> int:
    """Bytes that a rank sends when `size` bytes go once around a ring."""
    return size * (ranks - 1) // ranks


def _correlation(work: Workload, data: int) -> dict[str, int]:
    """The moments of every bank, reduced in forward and in backward."""
    moments = FP32 * (2 + len(work.form.concepts)) * work.form.free_slots
    return (
        {"correlation moments, all-reduce over data ranks": _ring(4 * moments, data)}
        if data > 1 and work.form.concepts
        else {}
    )


def smallest(work: Workload, strategy: str, memory: int, **how: bool) -> int | None:
    """Fewest devices (powers of two, and all banks one by one) on which a rank fits into `memory` bytes; `how` as for
    `estimate`."""
    counts = {2**i for i in range(MOST_DEVICES.bit_length())} | (
        {work.form.banks} if work.form.banks <= MOST_DEVICES else set()
    )
    for devices in sorted(counts):
        found = estimate(work, strategy, devices, **how)
        if found is not None and found.total <= memory:
            return devices
    return None
