"""Training with a place to die.

The place is step:N (right before update N), wake (while concept slots wake up), or write:N, rename:N, complete:N,
latest:N (inside the save after N steps: after its first file, before the folder is renamed, before COMPLETE, before
`latest` moves). The process ends by SIGKILL.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.support.ranks import LIMIT, Ended, Ranks
from tests.support.runs import arguments, train_rank
from trainer import loop
from trainer.checkpoint import saver
from trainer.stepping import Run
from trainer.stream import Batch
from trainer.sums import MicroBatch


def die(*_: object, **__: object) -> Any:
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, step: int) -> None:
    """Patch the place to die."""
    if place == "step":
        original = loop.to_micro_batch
        loop.to_micro_batch = lambda run, rows: die() if run.state.step == step else original(run, rows)
        return
    if place == "wake":
        loop.class_means = die
        return
    owner, name = {
        "write": (saver, "seal"),
        "rename": (Path, "rename"),
        "complete": (Path, "touch"),
        "latest": (Path, "replace"),
    }[place]
    save = saver.Saver.save

    def armed(self: saver.Saver, state: saver.RunState, *rest: Any, **named: Any) -> None:
        if state.step == step:
            self.wait()
            setattr(owner, name, die)
        save(self, state, *rest, **named)

    saver.Saver.save = armed  # type: ignore[method-assign]


def train_and_die(argv: list[str], where: str) -> None:
    """A rank that trains, and dies at a place unless that is empty."""
    if where:
        place, _, step = where.partition(":")
        arm(place, int(step or 0))
    train_rank(argv)


def train_slowly(argv: list[str], seconds: float) -> None:
    """A rank that trains and rests before every step, so that no machine takes more steps than that in a time."""
    original = loop.to_micro_batch

    def rested(run: Run, rows: Batch) -> MicroBatch:
        time.sleep(seconds)
        return original(run, rows)

    loop.to_micro_batch = rested
    train_rank(argv)


def train_apart(
    folder: Path, data: Path, *overrides: str, world: int = 1, die_at: str = "", limit: float = LIMIT
) -> Ended:
    """Train in folder/run on `world` ranks of their own, to the end or to where they die; `limit` in seconds."""
    with Ranks(world, train_and_die, arguments(folder, data, *overrides), die_at) as ranks:
        return ranks.wait(limit)
