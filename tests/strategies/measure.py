"""Memory and traffic of a few steps under a strategy, one JSON line per rank. docs/scaling.md quotes it:

    torchrun --standalone --nproc-per-node=4 tests/strategies/measure.py --strategy zero3 --slots 20000 --width 256

Memory is the growth of resident memory at its peak from before the dictionary is built, read from the kernel (VmHWM):
when all units were placed (placed_bytes), when the engine was built (build_bytes) and after the steps (peak_bytes).
snapshot_bytes is what an asynchronous save of the rank copies. Bytes are what the kernel counted on this process's TCP
sockets (TCP_INFO: acknowledged and received payload), which is what gloo moves data through.
"""

import argparse
import gc
import json
import os
import socket
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.losses import LossWeights
from trainer.objective import AlignObjective
from trainer.optimizer import OptimConfig
from trainer.private import reach
from trainer.strategies import Layout, ParallelConfig, build_strategy, join, owned_banks
from trainer.sums import MicroBatch
from trainer.topology import Topology, launched_world


def peak_resident() -> int:
    """Largest resident memory since the last reset, bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def reset_peak() -> int:
    """Let the peak start from what is resident now, and return it."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


def tcp_bytes() -> tuple[int, int]:
    """Payload bytes (sent and acknowledged, received) of all TCP sockets of this process."""
    sent = received = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            number = int(entry.name)
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        acknowledged, arrived = struct.unpack_from("QQ", info, 120)
        sent, received = sent + acknowledged, received + arrived
    return sent, received


class Gathered:
    """The most elements of partitioned parameters that were whole at once, seen after every fetch of ZeRO-3."""

    def __init__(self, parameters: list) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        self.peak = 0
        fetch = Coordinator.fetch_sub_module

        def watched(coordinator, *args, **kwargs) -> None:
            fetch(coordinator, *args, **kwargs)
            whole = sum(p.ds_numel for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
            self.peak = max(self.peak, whole)

        Coordinator.fetch_sub_module = watched


@dataclass
class Seen:
    """Peaks of resident memory (bytes) when all units were placed, when the engine was built and after the last step;
    bytes that it moved; ZeRO-3's peak of gathered elements; bytes of what this rank saves."""

    placed: int
    built: int
    peak: int
    sent: int
    received: int
    gathered: int | None
    snapshot: int


def exercise(args: argparse.Namespace, layout: Layout, topology: Topology) -> Seen:
    """Build as trainer.train does and take some steps."""
    form = DictionaryConfig(args.slots, args.bank_slots).form(args.width, [f"c{i}" for i in range(args.concepts)])
    strategy = build_strategy(layout, topology)
    dictionary = ConceptDictionary(
        form, owned=owned_banks(form.banks, topology), on_unit=lambda name, unit: strategy.place(unit)
    )
    placed = peak_resident()
    objective = AlignObjective(dictionary, topology, kernel=args.kernel, precision=args.precision)
    strategy.prepare(objective, OptimConfig(), 0)
    built = peak_resident()
    gathered = Gathered(list(objective.parameters())) if layout.zero_stage == 3 else None
    rows = args.rows // topology.data_world
    generator = torch.Generator().manual_seed(topology.data_rank)
    counts = torch.tensor([float(args.rows)] * 2 + [0.0])
    moved = (0, 0)
    for step in range(args.steps):
        acts = torch.randn(rows, args.width, generator=generator) / args.width**0.5
        concept = torch.randint(0, args.concepts, (rows, 1), generator=generator)
        topology.barrier()
        start = tcp_bytes()
        loss, _ = strategy.forward(
            MicroBatch(acts, concept, torch.full((rows,), -1), counts), LossWeights(), True, step
        )
        strategy.backward(loss, last=True)
        strategy.update(1e-3, 1.0, torch.tensor(True))
        topology.barrier()
        end = tcp_bytes()
        moved = (end[0] - start[0], end[1] - start[1])
    peak = peak_resident()
    states = [state for name in strategy.unit_names() if (state := strategy.read(name)) is not None]
    snapshot = sum(t.nbytes for state in states for part in vars(state).values() for t in part.values())
    return Seen(placed, built, peak, *moved, None if gathered is None else gathered.peak, snapshot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--dictionary-ranks", type=int, default=1)
    for name, value in {
        "slots": 20000,
        "width": 256,
        "bank-slots": 1000,
        "rows": 32,
        "concepts": 6,
        "steps": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--kernel", default="dense")
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rank, _, world = launched_world()
    banks = DictionaryConfig(args.slots, args.bank_slots).banks
    layout = ParallelConfig(args.strategy, args.dictionary_ranks).resolve(world, banks)
    topology = join(layout)
    tiny = argparse.Namespace(
        **vars(args) | {"slots": 4 * world, "bank_slots": 4, "width": 8, "rows": 4 * world, "steps": 1}
    )
    exercise(tiny, layout, topology)  # what is loaded and compiled on first use is not what is measured
    # Accelerate keeps the DeepSpeed settings of the first engine of a process.
    reach(AcceleratorState, "_reset_state", "accelerate", "tests/strategies/measure.py")()
    gc.collect()
    topology.barrier()
    before = reset_peak()
    seen = exercise(args, layout, topology)
    result = {
        "rank": rank,
        "world": world,
        "strategy": layout.strategy,
        "peak_bytes": seen.peak - before,
        "placed_bytes": seen.placed - before,
        "build_bytes": seen.built - before,
        "snapshot_bytes": seen.snapshot,
        "state_bytes": 16 * (args.slots + args.concepts) * (2 * args.width + 1),
        "sent_per_step": seen.sent,
        "received_per_step": seen.received,
    }
    if seen.gathered is not None:
        result |= {"gathered_elements": seen.gathered, "bank_elements": args.bank_slots * (2 * args.width + 1)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
