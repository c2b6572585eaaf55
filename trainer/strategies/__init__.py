"""Ways to spread training over ranks; the only home of accelerate, deepspeed and DistributedDataParallel."""

import torch
from accelerate import PartialState

from trainer.strategies.base import ParallelConfig, Strategy, UnitState, owned_banks
from trainer.strategies.local import LocalStrategy
from trainer.topology import Topology, build_topology, launched_world

__all__ = ["ParallelConfig", "Strategy", "UnitState", "build_strategy", "join", "owned_banks"]


def join(config: ParallelConfig) -> Topology:
    """Form the process group that the launcher announced and return this rank's place in the mesh. `config` is resolved."""
    cuda = torch.cuda.is_available()
    _, local_rank, world = launched_world()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        PartialState(cpu=not cuda, backend="nccl" if cuda else "gloo")
    return build_topology(config.dictionary_ranks, device)


def build_strategy(config: ParallelConfig, topology: Topology) -> Strategy:
    """The strategy that a resolved configuration names."""
    return LocalStrategy(topology)
