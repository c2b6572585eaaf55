"""The two stages of AlignSAE: schedules as pure functions of the step.

Steps are counted from 0: step s is the update from batch s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from trainer.errors import UserError
from trainer.losses import STAGES, LossConfig, LossWeights, StageWeights
from trainer.optimizer import OptimConfig


@dataclass
class StageConfig:
    """One stage: its name, its length in epochs or steps (one of them), and weights of the loss that differ from `loss`."""

    name: str = "pretrain"
    epochs: float | None = None
    steps: int | None = None
    loss: StageWeights = field(default_factory=StageWeights)

    def validate(self, where: str) -> None:
        """Raise UserError for what cannot be; `where` names the stage."""
        if self.name not in STAGES:
            raise UserError(f"{where}.name={self.name!r} is unknown; use {' or '.join(STAGES)}")
        if (self.epochs is None) == (self.steps is None):
            raise UserError(f"{where} ({self.name}) needs exactly one of epochs and steps")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserError(f"{where}.epochs={self.epochs} must be a finite number above 0")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"{where}.steps={self.steps} must be at least 1")
        self.loss.validate(where)

    def length(self, steps_per_epoch: int) -> int:
        """Steps of the stage, at least 1."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0) * steps_per_epoch))


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Raise UserError for stages that make no curriculum, whatever the data."""
    if not stages:
        raise UserError(
            "stages is empty; give at least one of {name: pretrain, epochs: N} and {name: align, epochs: N}"
        )
    for number, stage in enumerate(stages):
        stage.validate(f"stages.{number}")
    names = [stage.name for stage in stages]
    if "align" in names and "pretrain" in names[names.index("align") :]:
        raise UserError("stage pretrain follows align; concept slots that are awake cannot go back to sleep")


@dataclass(frozen=True)
class StepSettings:
    """What the curriculum says about one step."""

    stage: str
    align: bool  # concept slots are awake
    wakes: bool  # concept slots wake up right before this step
    weights: LossWeights
    lr: float


class Curriculum:
    """Stages laid end to end.

    Args:
        stages: in order; `pretrain` must not follow `align`.
        loss: weights, before the overrides of a stage.
        optim: learning rate, warm-up steps of each stage, share of the run that decays.
        steps_per_epoch: of the stream.
    """

    def __init__(self, stages: Sequence[StageConfig], loss: LossConfig, optim: OptimConfig, steps_per_epoch: int):
        check_stages(stages)
        self.optim = optim
        self.sp_warmup = loss.sp_warmup
        self.weights = [loss.weights().override(stage.loss) for stage in stages]
        self.names = [stage.name for stage in stages]
        self.starts = [0]
        for stage in stages:
            self.starts.append(self.starts[-1] + stage.length(steps_per_epoch))
        self.total = self.starts.pop()

    def at(self, step: int) -> StepSettings:
        """Stage, weights and learning rate of step 0 <= step < total."""
        index = max(i for i, start in enumerate(self.starts) if start <= step)
        weights, since = self.weights[index], step - self.starts[index]
        if step < self.sp_warmup and index == 0:
            weights = replace(weights, sp=weights.sp * (step + 1) / self.sp_warmup)
        align = self.names[index] == "align"
        wakes = align and since == 0 and "align" not in self.names[:index]
        return StepSettings(self.names[index], align, wakes, weights, self._lr(step, since))

    def _lr(self, step: int, since: int) -> float:
        warm = min(1.0, (since + 1) / (self.optim.warmup + 1))
        left = (self.total - step) / max(self.total * self.optim.decay, 1e-9)
        return self.optim.lr * warm * min(1.0, left)
