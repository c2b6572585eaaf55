"""Ways to spread training over ranks; the only home of accelerate, deepspeed and DistributedDataParallel."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

from trainer.agreement import require_agreement
from trainer.strategies.base import Strategy, UnitState, owned_banks
from trainer.strategies.launch_file import LaunchFile, launch_file
from trainer.strategies.layout import STRATEGIES, Layout, ParallelConfig
from trainer.strategies.local import LocalStrategy
from trainer.strategies.operator_locks import remove_left_locks
from trainer.strategies.zero import ZeroStrategy
from trainer.topology import Topology, build_topology, launched_world, limit_waiting, world_topology

__all__ = [
    "STRATEGIES",
    "LaunchFile",
    "Layout",
    "ParallelConfig",
    "Strategy",
    "UnitState",
    "build_strategy",
    "join",
    "launch_file",
    "owned_banks",
]


def join(layout: Layout, facts: Mapping[str, str] | None = None) -> Topology:
    """Form the process group that the launcher announced and return this rank's place in the mesh.

    facts: what ranks must have in common. They are compared before anything whose size or order they decide; see
        require_agreement.
    """
    cuda = torch.cuda.is_available() and not launch_file().cpu
    _, local_rank, world = launched_world()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    backend = "nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if layout.zero_stage:
        remove_left_locks()
    if world > 1:
        PartialState(cpu=not cuda, backend=backend, timeout=timedelta(seconds=layout.timeout))
    elif layout.zero_stage and not dist.is_initialized():  # DeepSpeed wants a group even for one process
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    require_agreement(facts or {}, world_topology(device))
    topology = build_topology(layout.dictionary_ranks, device)
    limit_waiting(layout.timeout)
    return topology


def build_strategy(layout: Layout, topology: Topology) -> Strategy:
    """The strategy of a layout."""
    if layout.zero_stage:
        return ZeroStrategy(topology, layout)
    return LocalStrategy(topology)
