"""trainer.train with a place to die: `DIE_AT=step:17 python tests/faults/dying_train.py --config ...` (or under torchrun).

DIE_AT is step:N (right before update N), wake (while concept slots wake up), or write:N, rename:N, complete:N, latest:N (inside the save after
N steps: after its first file, before the folder is renamed, before COMPLETE, before `latest` moves). The process ends by SIGKILL.
"""

import os
import signal
from pathlib import Path

from trainer import loop, train
from trainer.checkpoint import saver


def die(*_: object, **__: object) -> None:
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where: str, step: int) -> None:
    """Patch the place to die."""
    if where == "step":
        original = loop.to_micro_batch
        loop.to_micro_batch = lambda run, rows: die() if run.state.step == step else original(run, rows)
    elif where == "wake":
        loop.class_means = die
    elif where in ("write", "rename", "complete", "latest"):
        owner, name = {
            "write": (saver, "seal"), "rename": (Path, "rename"), "complete": (Path, "touch"), "latest": (Path, "replace"),
        }[where]  # fmt: skip
        save = saver.Saver.save

        def armed(self: saver.Saver, state: saver.RunState, last: bool = False) -> None:
            if state.step == step:
                self.wait()
                setattr(owner, name, die)
            save(self, state, last)

        saver.Saver.save = armed
    elif where:
        raise SystemExit(f"DIE_AT={where} is unknown")


if __name__ == "__main__":
    place, _, number = os.environ.get("DIE_AT", "").partition(":")
    arm(place, int(number or 0))
    train.exit_with(train.main())
