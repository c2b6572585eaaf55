"""Fingerprint of which rows were trained on at which position, summed over ranks and chained over steps.

Rows count by their numbers. What they hold is bound to the manifest's digest by the crc32 of every block, which
BlockSource checks.
"""

import numpy as np

_MASK = (1 << 64) - 1
# Odd multiplier of the chain (Knuth's 64-bit LCG constant): odd, so that no step is ever forgotten.
_P = 6364136223846793005


def mix64(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: a bijection of uint64 that passes for random. uint64 [...] -> uint64 [...].

    Used instead of numpy's generators because their streams may change between numpy versions (NEP 19), and an epoch
    order must not.
    """
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def step_digest(row_ids, positions) -> int:
    """s = sum over rows of hash64(row id, position) mod 2^64; digests of the ranks of a step add up to the global one.

    row_ids, positions: int64 [B], arrays or CPU tensors.
    """
    rows = np.asarray(row_ids, dtype=np.int64).astype(np.uint64)
    places = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    return int(mix64(mix64(rows) + places * np.uint64(_P)).sum(dtype=np.uint64))


class RowDigest:
    """The chain D_t = (D_{t-1} P + s_t) mod 2^64 over the steps of a run.

    It is linear: the chains of the data ranks, each fed its own rows, add up mod 2^64 to the chain of the global
    batches. On resume one rank starts from the saved global value and the others from 0.
    """

    def __init__(self, value: int = 0):
        self.value = value & _MASK

    def update(self, row_ids, positions) -> None:
        """Append one step. row_ids, positions: int64 [B] of this rank."""
        self.value = (self.value * _P + step_digest(row_ids, positions)) & _MASK

    @property
    def signed(self) -> int:
        """The value as a two's complement int64, for an int64 tensor whose SUM all-reduce wraps as it should."""
        return self.value - (1 << 64) if self.value >> 63 else self.value

    @staticmethod
    def combine(values) -> "RowDigest":
        """Chain of the global batches from the (signed or unsigned) values of all data ranks."""
        return RowDigest(sum(int(v) for v in values) & _MASK)

    def hex(self) -> str:
        """16 hex digits."""
        return f"{self.value:016x}"
