"""Numbers that go wrong: updates that must not be made, the same decision on all ranks."""

import logging
import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.files import Count
from trainer.journal import Journal
from trainer.stream import Order

log = logging.getLogger(__name__)

MOST = 1_000_000  # losses that are kept, updates that are counted


@dataclass
class GuardConfig:
    """When an update is skipped, and when the run gives up. What is not finite is always skipped."""

    spike: float = 0.0  # skip where the loss exceeds this many times its running median; 0 = off
    # Accepted losses that the median is taken over, of one stage; before they are there nothing is a spike.
    window: int = 50
    stop_after: int = 10  # skipped updates in a row after which the run stops

    def validate(self) -> None:
        """Raise UserError for a bound that cannot be."""
        if self.spike and not 1 < self.spike < math.inf:
            raise UserError(f"guard.spike={self.spike} must be above 1, or 0 for off")
        for name in ("window", "stop_after"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"guard.{name}={getattr(self, name)} must be between 1 and {MOST}")


@dataclass
class GuardState:
    """What a guard remembers, as state.json stores it.

    skipped: updates that were not made. in_a_row: those since the last one that was. losses: accepted ones of `stage`,
    the latest last, where guard.spike needs them.
    """

    skipped: Count = 0
    in_a_row: Count = 0
    stage: str = ""
    losses: list[float] = field(default_factory=list)


class Guard:
    """Judges losses and gradient norms of the global batch, which are the same on all ranks.

    Args:
        config: bounds.
        plan: names the rows of a step.
        journal: skipped.jsonl, on the rank that writes it; None on the others.
        state: what `state` gave at the checkpoint that the run goes on from.
        device: where losses are judged. What it decides there is booked on the host when the figures are read.
    """

    def __init__(
        self,
        config: GuardConfig,
        plan: Order,
        journal: Journal | None,
        state: GuardState,
        device: torch.device | None = None,
    ):
        self.config, self.plan, self.journal = config, plan, journal
        self.skipped, self.in_a_row, self._stage = state.skipped, state.in_a_row, state.stage
        self._losses = deque(state.losses, maxlen=config.window)
        self._judged_stage = state.stage
        self._recent: Tensor | None = None  # the same losses on the device, infinite where there is none yet
        if config.spike:
            recent = [math.inf] * (config.window - len(self._losses)) + list(self._losses)
            self._recent = torch.tensor(recent, dtype=torch.float64, device=device)

    def state(self) -> GuardState:
        """Counts and recent losses, for state.json."""
        recent = list(self._losses) if self.config.spike else []
        return GuardState(self.skipped, self.in_a_row, self._stage, recent)

    def judge(self, loss: Tensor, stage: str) -> Tensor:
        """Whether the step with this loss may change the weights, as far as the loss says; scalars."""
        if stage != self._judged_stage:  # other terms: earlier losses say nothing
            self._judged_stage = stage
            if self._recent is not None:
                self._recent.fill_(math.inf)
        fine = loss < math.inf  # and a number; a loss is never below 0
        if self._recent is None:
            return fine
        ordered, window = self._recent.sort().values, self.config.window
        usual = (ordered[(window - 1) // 2] + ordered[window // 2]) / 2
        return fine & ((loss <= self.config.spike * usual) | (self._recent[0] == math.inf))

    def follow(self, loss: Tensor, made: Tensor) -> None:
        """Whether the update of a step with this loss was made, a scalar bool."""
        if self._recent is not None:
            self._recent = torch.where(made, torch.cat([self._recent[1:], loss[None]]), self._recent)

    def problem(self, loss: float, norm: float, stage: str) -> str:
        """Why the update of a step of this stage was not made; asked before later steps are accepted."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.config.spike and stage == self._stage and len(self._losses) == self.config.window:
            usual = median(self._losses)
            if loss > self.config.spike * usual:
                return f"the loss {loss:.4g} is over guard.spike={self.config.spike:g} times its median {usual:.4g}"
        return f"the gradient norm is {norm}"

    def accept(self, loss: float, stage: str) -> None:
        """The update was made."""
        self.in_a_row = 0
        self._enter(stage)
        self._losses.append(loss)

    def _enter(self, stage: str) -> None:
        if stage != self._stage:
            self._stage = stage
            self._losses.clear()

    def skip(self, step: int, problem: str, loss: float, norm: float) -> None:
        """The update from batch `step` was not made: count it, record its rows. UserError after too many in a row."""
        self.skipped += 1
        self.in_a_row += 1
        if self.journal is not None:
            log.warning("step %d: update skipped, %s (%d so far)", step, problem, self.skipped)
            rows = self.plan.step_rows(step).tolist()
            figures = {"loss": repr(loss), "grad_norm": repr(norm)}  # as text: JSON has no NaN
            self.journal.write({"step": step + 1, "batch": step, "problem": problem, **figures, "row_ids": rows})
        if self.in_a_row >= self.config.stop_after:
            raise UserError(
                f"{self.in_a_row} updates in a row were skipped, the last at step {step} because {problem}; "
                f"look at the rows in skipped.jsonl, lower optim.lr, or raise guard.stop_after={self.config.stop_after}"
            )
