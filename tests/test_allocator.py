"""Blocks of the size of a step's temporaries are used again instead of being taken from the system anew."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the policy is for glibc")

# Eight blocks of 3 MiB at a time, as a step of 1,024 rows of width 768 has them; prints whether the policy holds and
# the faults of ten rounds.
ROUNDS = """
import resource, torch
from trainer.allocator import keep_freed_memory
print(keep_freed_memory())
def a_round():
    blocks = [torch.ones(1024, 768) for _ in range(8)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    a_round()
before = faults()
for _ in range(10):
    a_round()
print(faults() - before)
"""


def run_rounds(**environment: str) -> tuple[bool, int]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | environment
    command = [sys.executable, "-c", ROUNDS]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    ).stdout
    held, count = done.split()
    return held == "True", int(count)


def test_freed_blocks_are_used_again():
    held, faults = run_rounds()
    assert held and faults < 1000  # a system short of memory takes a block back now and then


def test_the_environment_wins():
    """And without the policy a round of blocks costs thousands of faults."""
    held, faults = run_rounds(MALLOC_MMAP_THRESHOLD_="131072")
    assert not held and faults > 10_000
