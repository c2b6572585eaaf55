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
    """One stage: its name, its length in epochs or steps (one of them), and what differs in it from the rest of the run."""

    name: str = "pretrain"
    epochs: float | None = None
    steps: int | None = None
    loss: StageWeights = field(default_factory=StageWeights)
    k: int | None = None  # with the gate batch_topk: active slots to aim at; None: dictionary.k; 0: the threshold stays

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
        if self.k is not None and self.k < 0:
            raise UserError(f"{where}.k={self.k} must not be negative")
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
class L0Target:
    """Where the number of active free slots of a row is to be: it falls from `start` to `k` over `fall` steps, then stays."""

    k: float
    start: float
    fall: int

    def at(self, since: int) -> float:
        """The number that is aimed at `since` steps after the fall began."""
        left = max(0.0, 1.0 - since / self.fall) if self.fall else 0.0
        return self.k * max(self.start / self.k, 1.0) ** left


@dataclass(frozen=True)
class StepSettings:
    """What the curriculum says about one step."""

    stage: str
    align: bool  # concept slots are awake
    wakes: bool  # concept slots wake up right before this step
    weights: LossWeights
    lr: float
    l0: float | None = None  # active free slots of a row that the gate aims at; None: it does not


class Curriculum:
    """Stages laid end to end.

    Args:
        stages: in order; `pretrain` must not follow `align`.
        loss: weights, before the overrides of a stage.
        optim: learning rate, warm-up steps of each stage, share of the run that decays.
        steps_per_epoch: of the stream.
        target: of a gate that keeps the number of active slots; sparsity then has no weight where it does, unless a stage gives one.
    """

    def __init__(
        self,
        stages: Sequence[StageConfig],
        loss: LossConfig,
        optim: OptimConfig,
        steps_per_epoch: int,
        target: L0Target | None = None,
    ):
        check_stages(stages)
        self.optim = optim
        self.targets = [_target(stage, target) for stage in stages]
        self.sp_warmup = loss.sp_warmup
        self.weights = [
            (loss.weights() if aim is None else replace(loss.weights(), sp=0.0)).override(stage.loss)
            for stage, aim in zip(stages, self.targets, strict=True)
        ]
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
        return StepSettings(self.names[index], align, wakes, weights, self._lr(step, since), self._l0(step, index))

    def _l0(self, step: int, index: int) -> float | None:
        target = self.targets[index]
        if target is None:
            return None
        began = next(start for start, aim in zip(self.starts, self.targets, strict=True) if aim is not None)
        return target.at(step - began)

    def _lr(self, step: int, since: int) -> float:
        warm = min(1.0, (since + 1) / (self.optim.warmup + 1))
        left = (self.total - step) / max(self.total * self.optim.decay, 1e-9)
        return self.optim.lr * warm * min(1.0, left)


def _target(stage: StageConfig, target: L0Target | None) -> L0Target | None:
    """What a stage aims at, where the dictionary's gate aims at something."""
    if target is None or stage.k is None:
        return target
    return replace(target, k=float(stage.k)) if stage.k else None
