"""Requests to stop: signals and the wall clock.

They set a flag; the loop reduces the flags of all ranks and stops between two steps.
"""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch

from trainer.topology import Topology

# Exit codes: EX_TEMPFAIL of sysexits.h, "try again later", which launch/slurm requeues on; and the shell's code for
# Ctrl-C.
REQUEUE, INTERRUPTED = 75, 130


class Interrupt:
    """Context in which SIGTERM, SIGUSR1 and SIGINT ask for a stop instead of ending the process.

    A second SIGINT ends it at once. `why` says in words what this rank was asked by, "" for nothing.
    """

    def __init__(self) -> None:
        self.why = ""
        self.deadline = float("inf")
        self._began = time.monotonic()
        self._code = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def limit(self, minutes: float) -> None:
        """Ask for a stop when `minutes` have passed since this object was made; 0 = never."""
        if minutes > 0:
            self.deadline = self._began + 60 * minutes

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.why = signal.Signals(number).name
        self._code = INTERRUPTED if number == signal.SIGINT else REQUEUE
        if number == signal.SIGINT:
            # The default action needs no Python, so that a second Ctrl-C works inside a collective that hangs.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def votes(self) -> list[float]:
        """(stop and requeue, stop for good) of this rank, to be summed over all ranks."""
        if not self.why and time.monotonic() >= self.deadline:
            self.why, self._code = "run.wall_minutes is over", REQUEUE
        return [float(self._code == REQUEUE), float(self._code == INTERRUPTED)]

    @staticmethod
    def code(requeue: float, interrupted: float) -> int:
        """Exit code from the summed votes; 0 = go on."""
        return INTERRUPTED if interrupted else REQUEUE if requeue else 0

    def agree(self, topology: Topology) -> int:
        """`code` of all ranks, where there is no reduction to add votes to. Called on all ranks."""
        votes = torch.tensor(self.votes(), dtype=torch.float64, device=topology.device)
        return self.code(*topology.sum_over_world(votes).tolist())
