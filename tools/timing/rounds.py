"""Timing of several subjects that take turns: seconds and page faults of each repetition."""

import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Subject:
    """What is timed, and what is done before each repetition, off the clock."""

    run: Callable[[], Any]
    before: Callable[[], Any] = lambda: None


Subjects = dict[str, Subject]


@dataclass
class Timed:
    """What the repetitions of one subject took, and the pages that the process had to be given meanwhile."""

    seconds: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass
class Rounds:
    """How often and by which clock."""

    repeats: int
    clock: Callable[[], float]

    def measure(self, subjects: Subjects, device: str) -> dict[str, Timed]:
        """One warm-up round, then rounds in which each subject runs once."""
        found = {name: Timed() for name in subjects}
        for number in range(self.repeats + 1):
            for name, subject in subjects.items():
                subject.before()
                seconds, faults = self.once(subject.run, device)
                if number:
                    found[name].seconds.append(seconds)
                    found[name].faults.append(faults)
        return found

    def once(self, run: Callable[[], Any], device: str) -> tuple[float, int]:
        """Seconds and page faults of one call."""
        wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        wait()
        faults, began = _page_faults(), self.clock()
        run()
        wait()
        return self.clock() - began, _page_faults() - faults


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
