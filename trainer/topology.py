"""Who we are: rank, world, device and the (data, dictionary) mesh. The only room that asks torch.distributed.

Ranks of one dictionary group see the same rows and hold different banks; ranks of one data group hold the same banks
and see different rows. World = data_world x dictionary_world, dictionary ranks next to each other (so that they share a
node).
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from trainer import private
from trainer.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Position of this process in the mesh. Groups are None where they have one member."""

    rank: int = 0
    world: int = 1
    data_rank: int = 0
    data_world: int = 1
    dictionary_rank: int = 0
    dictionary_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_group: Any = None
    dictionary_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and shared files."""
        return self.rank == 0

    @property
    def lag(self) -> int:
        """Steps that the device works ahead of what the host knows; 0: every number is there when it is made."""
        return 0 if self.device.type == "cpu" else 1

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Sum over data ranks, in place; returns the tensor."""
        if self.data_group is not None:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def sum_over_dictionary(self, tensor: Tensor) -> Tensor:
        """Sum over dictionary ranks, in place; returns the tensor."""
        if self.dictionary_group is not None:
            dist.all_reduce(tensor, group=self.dictionary_group)
        return tensor

    def sum_over_world(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place; returns the tensor."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_over_data(self, tensor: Tensor) -> Tensor:
        """Maximum over data ranks, in place; returns the tensor."""
        if self.data_group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.data_group)
        return tensor

    def gather_over_data(self, mine: Tensor) -> tuple[Tensor, int]:
        """Rows [G, ...] of all data ranks, in the order of the ranks (which is that of the lanes), and where this
        rank's [B, ...] begin; B may differ."""
        sizes = torch.zeros(self.data_world, dtype=torch.int64, device=mine.device)
        sizes[self.data_rank] = len(mine)
        sizes = self.sum_over_data(sizes)
        first = int(sizes[: self.data_rank].sum())
        everyone = mine.new_zeros(int(sizes.sum()), *mine.shape[1:])
        everyone[first : first + len(mine)] = mine
        return self.sum_over_data(everyone), first

    def any_over_world(self, flag: bool) -> bool:
        """Whether any rank says yes."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def share(self, mine: bytes) -> list[bytes]:
        """The bytes of all ranks, in the order of ranks; they may differ in length."""
        if self.world == 1:
            return [mine]
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(mine)], device=self.device))
        sizes = [int(length) for length in lengths]
        padded = torch.frombuffer(bytearray(mine.ljust(max(*sizes, 1), b"\0")), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return [bytes(part.cpu().tolist())[:size] for part, size in zip(parts, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


def launched_world() -> tuple[int, int, int]:
    """(rank, local rank, world) as the launcher announced them in the environment; (0, 0, 1) without a launcher."""
    found = []
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        value = os.environ.get(name) or alone
        if not value.isdecimal():
            raise UserError(f"{name}={value!r} in the environment is no number; a launcher sets it, or unset it")
        found.append(int(value))
    rank, local_rank, world = found
    if not rank < max(world, 1):
        raise UserError(
            f"RANK={rank} in the environment does not fit WORLD_SIZE={world}; unset both or start with a launcher"
        )
    return rank, local_rank, world


def check_mesh(world: int, dictionary_ranks: int) -> None:
    """Raise UserError unless `dictionary_ranks` divides `world`; names the nearest setting that does."""
    if dictionary_ranks < 1 or world % dictionary_ranks:
        nearest = min((n for n in range(1, world + 1) if world % n == 0), key=lambda n: abs(n - dictionary_ranks))
        raise UserError(
            f"parallel.dictionary_ranks={dictionary_ranks} does not divide the {world} launched processes; "
            f"the nearest possible setting is {nearest}"
        )


def limit_waiting(seconds: float) -> None:
    """Let no group wait longer than this in a collective.

    The time limit of the process group does not pass on to groups made later, of the mesh or by DeepSpeed: torch gives
    those 10 or 30 minutes.
    """
    if dist.is_initialized():
        private.limit_groups(timedelta(seconds=seconds))


def world_topology(device: torch.device) -> Topology:
    """All ranks of the process group that exists by now, before they have a mesh: what they agree with."""
    if not dist.is_initialized():
        return Topology(device=device)
    return Topology(rank=dist.get_rank(), world=dist.get_world_size(), device=device)


def build_topology(dictionary_ranks: int, device: torch.device) -> Topology:
    """The mesh of the process group that exists by now (or of this one process).

    Args:
        dictionary_ranks: members of each dictionary group; must divide the world.
        device: where this rank computes.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        check_mesh(1, dictionary_ranks)
        return Topology(device=device)
    world, rank = dist.get_world_size(), dist.get_rank()
    check_mesh(world, dictionary_ranks)
    mesh = init_device_mesh(
        device.type, (world // dictionary_ranks, dictionary_ranks), mesh_dim_names=("data", "dictionary")
    )
    data_world, dictionary_world = world // dictionary_ranks, dictionary_ranks
    return Topology(
        rank=rank,
        world=world,
        data_rank=mesh.get_local_rank("data"),
        data_world=data_world,
        dictionary_rank=mesh.get_local_rank("dictionary"),
        dictionary_world=dictionary_world,
        device=device,
        data_group=mesh.get_group("data") if data_world > 1 else None,
        dictionary_group=mesh.get_group("dictionary") if dictionary_world > 1 else None,
    )
