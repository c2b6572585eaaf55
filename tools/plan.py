"""Memory per rank and bytes moved per step of a configuration under every strategy, before anything is launched.

    alignsae plan --config configs/large.yaml --devices 64 --device-memory 80GiB --width 4096 --concepts 100
    alignsae plan --scaling > table.md

Width and concepts come from the manifest of data.shards, or from --width and --concepts where the data does not exist yet. Memory is the peak within
a step: weights, gradients, AdamW's two moments (all fp32), what a strategy gathers or copies, and what the largest bank needs while it is
computed; or, where that is more, what building the engine takes. Bytes are what one rank sends in one step; it receives as many. With
--backend gloo the figures are those of CPU ranks, where a reduce-scatter costs an all-reduce and an all-gather a copy; the tests hold
them against measurements.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from trainer.config import Config, load_config
from trainer.dictionary import DictionaryConfig, bank_sizes
from trainer.errors import UserError
from trainer.strategies import owned_banks
from trainer.stream import Manifest
from trainer.topology import Topology

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "dictionary")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
FP32 = 4
MOST_DEVICES = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes that memory and traffic follow from. rows: of the global batch; low: products in bf16."""

    width: int
    concepts: int
    answers: int
    dictionary: DictionaryConfig
    rows: int
    low: bool

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
    build: int = 0  # while the engine is built, before the first step
    sent: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Peak bytes of a rank."""
        step = self.weights + self.gradients + self.optimizer + self.buffers + self.activations
        return max(step, self.build)


def estimate(
    shape: Shape, strategy: str, devices: int, *, gloo: bool = False, offload: bool = False
) -> Estimate | None:
    """What a strategy needs on `devices` ranks; None where the combination cannot be."""
    if strategy == "single":
        return _local(shape, strategy, 1, 1) if devices == 1 else None
    if strategy == "ddp":
        return _local(shape, strategy, devices, 1)
    if strategy == "dictionary":
        return _local(shape, strategy, 1, devices) if devices <= shape.banks else None
    return _zero(shape, strategy, devices, gloo, offload)


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
        optimizer=2 * FP32 * elements,
        buffers=0,
        activations=shape.activations(rows),
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
    return Estimate(
        strategy,
        devices,
        weights=whole if stage < 3 else shard,
        gradients=(whole if stage == 1 else 0 if stage == 2 and gloo else shard) + (bank if stage == 3 else 0),
        optimizer=0 if offload else masters + 2 * shard,
        buffers=buffers,
        activations=shape.activations(-(-shape.rows // devices)),
        build=whole + (shard if stage == 3 else whole),  # every rank makes all weights, then keeps its share
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


def smallest(shape: Shape, strategy: str, memory: int, *, gloo: bool = False, offload: bool = False) -> int | None:
    """Fewest devices (powers of two, and all banks one by one) on which a rank fits into `memory` bytes."""
    counts = {2**i for i in range(MOST_DEVICES.bit_length())} | (
        {shape.banks} if shape.banks <= MOST_DEVICES else set()
    )
    for devices in sorted(counts):
        found = estimate(shape, strategy, devices, gloo=gloo, offload=offload)
        if found is not None and found.total <= memory:
            return devices
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Configuration, devices, and sizes where there is no data yet."""
    parser.add_argument("--config", help="YAML file of the run; see configs/")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="ranks (default %(default)s)")
    parser.add_argument("--device-memory", default="80GiB", metavar="SIZE", help="per rank (default %(default)s)")
    parser.add_argument("--width", type=int, help="model width D, where data.shards does not exist yet")
    parser.add_argument("--concepts", type=int, default=0, help="concepts R, with --width (default %(default)s)")
    parser.add_argument("--answers", type=int, default=0, help="answers A, with --width (default %(default)s)")
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the estimates here as well")
    parser.add_argument("--scaling", action="store_true", help="print the Markdown table of docs/scaling.md instead")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    memory = parse_size(args.device_memory)
    if args.devices < 1:
        raise UserError(f"--devices {args.devices} must be at least 1")
    if args.scaling:
        print(scaling_table(memory))
        return 0
    if not args.config:
        raise UserError("--config is missing; give a YAML file, or --scaling for the general table")
    config, shape = read_shape(args)
    gloo, offload = args.backend == "gloo", config.parallel.offload
    found = [(s, estimate(shape, s, args.devices, gloo=gloo, offload=offload)) for s in STRATEGIES]
    elements = shape.free + shape.shared
    print(
        f"{shape.dictionary.free_slots:,} free slots in {shape.banks} banks, {shape.concepts} concepts, width {shape.width}: "
        f"{elements:,} parameters; {shape.rows} rows a step on {args.devices} devices of {args.device_memory}\n"
    )
    names = ("weights", "gradients", "optimizer", "buffers", "activations", "build", "total")
    print(
        f"{'strategy':<11}"
        + "".join(f"{name:>13}" for name in names)
        + f"{'sent/step':>13}{'fits':>6}{'fits from':>11}"
    )
    for strategy, e in found:
        fewest = smallest(shape, strategy, memory, gloo=gloo, offload=offload)
        if e is None:
            cells, fits, sent = "-", "-", "-"
            row = "".join(f"{cells:>13}" for _ in names)
        else:
            row = "".join(f"{human(getattr(e, name)):>13}" for name in names)
            fits, sent = ("yes" if e.total <= memory else "no"), human(sum(e.sent.values()))
        print(f"{strategy:<11}{row}{sent:>13}{fits:>6}{fewest if fewest else 'never':>11}")
    print("\nBytes that a rank sends in a step:")
    for strategy, e in found:
        for what, size in (e.sent if e else {}).items():
            print(f"  {strategy:<11}{human(size):>11}  {what}")
    if args.json:
        args.json.write_text(json.dumps([asdict(e) | {"total": e.total} for _, e in found if e], indent=1) + "\n")
    return 0


def read_shape(args: argparse.Namespace) -> tuple[Config, Shape]:
    """Sizes from configuration and manifest. Raises UserError when there is neither a manifest nor --width."""
    config = load_config(args.config, args.overrides)
    if args.width is None:
        try:
            manifest = Manifest.load(config.data.shards)
        except UserError as error:
            raise UserError(f"{error}; or give --width and --concepts") from error
        width, concepts, answers = manifest.width, len(manifest.concepts), len(manifest.answers)
    else:
        width, concepts, answers = args.width, args.concepts, args.answers
    if width < 1 or concepts < 0 or answers < 0:
        raise UserError(f"--width {width}, --concepts {concepts} and --answers {answers} cannot be")
    low = config.run.precision == "bf16"
    rows = -(-config.data.global_batch // config.optim.accumulate)
    return config, Shape(width, concepts, answers, config.dictionary, rows, low)


def scaling_table(memory: int) -> str:
    """Markdown: 100k, 1M and 16M slots by width, and what they need from 1 to 512 devices."""
    lines = [
        "| slots | width | parameters | single | devices | ddp | zero3 | dictionary | dictionary sends per step "
        f"| fits {human(memory)} from (zero3 / dictionary) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for slots in (100_000, 2**20, 2**24):
        for width in (768, 2048, 4096, 8192):
            shape = Shape(width, 100, 1000, DictionaryConfig(slots, 8192), 8192, True)
            alone = estimate(shape, "single", 1)
            fewest = [smallest(shape, s, memory) or "never" for s in ("zero3", "dictionary")]
            for devices in (8, 64, 512):
                found = {s: estimate(shape, s, devices) for s in ("ddp", "zero3", "dictionary")}
                cells = [human(e.total) if e else "more ranks than banks" for e in found.values()]
                sent = human(sum(found["dictionary"].sent.values())) if found["dictionary"] else "-"
                head = f"| {slots:,} | {width} | {(shape.free + shape.shared) / 1e9:.2f} G | {human(alone.total) if alone else '-'} "
                lines.append(f"{head}| {devices} | {' | '.join(cells)} | {sent} | {fewest[0]} / {fewest[1]} |")
    return "\n".join(lines)


def parse_size(text: str) -> int:
    """`80GiB` -> bytes. Raises UserError for anything else."""
    number = text.rstrip("BKMGTi")
    unit = text[len(number) :] or "B"
    try:
        size = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise UserError(f"--device-memory {text} is not a size; write for example 80GiB or 512MiB") from None
    if not 0 < size < 2**60:
        raise UserError(f"--device-memory {text} must be above 0")
    return int(size)


def human(size: float) -> str:
    """Bytes with a binary unit."""
    unit = next(u for u, factor in reversed(UNITS.items()) if size >= factor or u == "B")
    return f"{size / UNITS[unit]:.{0 if unit == 'B' else 2}f} {unit}"
