"""How many warps a program gets, and the tiles of the encoder's product.

tests/kernels/test_triton_compiles.py holds every kernel to what is said here about registers and shared memory.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from trainer.kernels.triton import search


class Tile(NamedTuple):
    """Slots and rows of a tile, numbers of a step along the width, warps, and steps that are loaded ahead."""

    slots: int
    rows: int
    step: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """What the encoder is compiled for."""
        return {"BS": self.slots, "BR": self.rows, "BD": self.step, "GROUP": GROUP}


GROUP = 8  # tiles of slots whose weights stay in the cache
# What is measured once on the device, for each width. All find the same entries, so that a run does not depend on which
# one is the fastest. The wide tile fits the registers on sm_90 alone.
TILES = (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3))
WIDE = Tile(128, 256, 64, 8, 3)
SMALL = Tile(32, 32, 16, 1, 1)  # for the interpreter, whose cost is per step
WARPS_PER_PROCESSOR = 8  # of the encoder, whose registers hold the tiles' sums
REGISTERS = 128  # of a thread of the other kernels at most, so that a processor holds 16 warps of them


def tiles(capability: int) -> tuple[Tile, ...]:
    """Those to choose from on a device of this compute capability (80, 90, 100)."""
    return (*TILES, WIDE) if capability == 90 else TILES


def warps(width: int) -> int:
    """Warps of a program that holds vectors of `width` numbers in registers."""
    return min(max(width // 256, 1), 16)


def side_by_side(concepts: int) -> int:
    """Entries that a program looks at together where each has so many numbers."""
    return max(1, min(16, 2048 // concepts))


def block(width: int) -> int:
    """Numbers that a program holds of a vector of this width."""
    return triton.next_power_of_2(max(width, 16))


@functools.cache
def _tuned(capability: int) -> Any:
    configs = [
        triton.Config(tile.constants, num_warps=tile.warps, num_stages=tile.stages) for tile in tiles(capability)
    ]
    return triton.autotune(configs, key=["D"])(search.encode)


def launch_encoder(
    operand: Tensor, encoder: Tensor, bound: Tensor, by_slot: Tensor, by_row: Tensor, sizes: tuple[int, ...]
) -> None:
    """search.encode over all tiles; sizes: its B, places, D, row_words, slot_words."""
    args = (operand, encoder, bound, by_slot, by_row, *sizes)
    if operand.device.type == "cpu":
        search.encode[(2,)](*args, **SMALL.constants)
        return
    device = torch.cuda.get_device_properties(operand.device)
    programs = device.multi_processor_count * WARPS_PER_PROCESSOR
    _tuned(10 * device.major + device.minor)[lambda chosen: (programs // chosen["num_warps"],)](*args)
