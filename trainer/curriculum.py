"""The two stages of AlignSAE: schedules as pure functions of the step.

Steps are counted from 0: step s is the update from batch s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from trainer.errors import UserError
from trainer.files import Count
from trainer.losses import STAGES, LossConfig, LossWeights, StageWeights
from trainer.optimizer import OptimConfig

MOST_STEPS = 1 << 40


@dataclass
class StageConfig:
    """One stage: its name, its length in epochs or steps (one of them), and what differs in it from the rest of the
    run."""

    name: str = "pretrain"  # pretrain: concept slots sleep | align: all terms count
    epochs: float | None = None  # length in passes over the data
    steps: int | None = None  # or in steps
    mix: dict[str, float] = field(default_factory=dict)  # source (data.sources) -> share of a batch; adds up to 1
    loss: StageWeights = field(default_factory=StageWeights)
    # Active free slots to aim at; None: dictionary.k or target_l0; 0: threshold and weight of sparsity stay.
    k: int | None = None

    def validate(self, where: str) -> None:
        """Raise UserError for what cannot be; `where` names the stage."""
        if self.name not in STAGES:
            raise UserError(f"{where}.name={self.name!r} is unknown; use {' or '.join(STAGES)}")
        if (self.epochs is None) == (self.steps is None):
            raise UserError(f"{where} ({self.name}) needs exactly one of epochs and steps")
        if self.epochs is not None and not 0 < self.epochs <= MOST_STEPS:
            raise UserError(f"{where}.epochs={self.epochs} must be a finite number above 0, at most {MOST_STEPS}")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"{where}.steps={self.steps} must be at least 1, at most {MOST_STEPS}")
        if self.k is not None and not 0 <= self.k <= MOST_STEPS:
            raise UserError(f"{where}.k={self.k} must be between 0 and {MOST_STEPS}")
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
    """Where the number of active free slots of a row is to be: it falls from `start` to `k` over `fall` steps, then
    stays. by_gate: whether the gate sees to it, so that no weight of sparsity has to."""

    k: float
    start: float
    fall: int
    by_gate: bool = True

    def at(self, since: int) -> float:
        """The number that is aimed at `since` steps after the fall began."""
        left = max(0.0, 1.0 - since / self.fall) if self.fall else 0.0
        return self.k * max(self.start / self.k, 1.0) ** left


@dataclass(frozen=True)
class StepSettings:
    """What the curriculum says about one step."""

    stage: str
    align: bool  # concept slots take part; they wake up before the first such step
    weights: LossWeights
    lr: float
    l0: float | None = None  # active free slots of a row that are aimed at; None: none are

    def with_sparsity(self, factor: float) -> "StepSettings":
        """The same with another weight of sparsity."""
        return replace(self, weights=replace(self.weights, sp=self.weights.sp * factor))


@dataclass
class CurriculumRecord:
    """What a checkpoint says about the curriculum that it was made under."""

    names: list[str]
    starts: list[Count]  # first step of each stage
    total: Count  # steps

    def describe(self) -> str:
        """In words."""
        ends = [*self.starts[1:], self.total]
        return ", ".join(f"{n} {a}-{b}" for n, a, b in zip(self.names, self.starts, ends, strict=False))


class Curriculum:
    """Stages laid end to end.

    Args:
        stages: in order; `pretrain` must not follow `align`.
        loss: weights, before the overrides of a stage.
        optim: learning rate, warm-up steps of each stage, share of the run that decays.
        steps_per_epoch: of each stage, what an epoch of the source is that its mix names first.
        target: number of active slots; where a gate keeps it, sparsity has no weight, unless a stage gives one.
    """

    def __init__(
        self,
        stages: Sequence[StageConfig],
        loss: LossConfig,
        optim: OptimConfig,
        steps_per_epoch: Sequence[int],
        target: L0Target | None = None,
    ):
        check_stages(stages)
        self.optim = optim
        self.targets = [_target(stage, target) for stage in stages]
        self.sp_warmup = loss.sp_warmup
        self.weights = [
            (replace(loss.weights(), sp=0.0) if aim and aim.by_gate else loss.weights()).override(stage.loss)
            for stage, aim in zip(stages, self.targets, strict=True)
        ]
        self.names = [stage.name for stage in stages]
        self.starts = [0]
        for stage, steps in zip(stages, steps_per_epoch, strict=True):
            self.starts.append(self.starts[-1] + stage.length(steps))
        self.total = self.starts.pop()

    def record(self) -> CurriculumRecord:
        """For a checkpoint."""
        return CurriculumRecord(self.names, self.starts, self.total)

    def refuse_other_past(self, step: int, stage: str, awake: bool, record: CurriculumRecord | None) -> None:
        """Raise UserError unless this curriculum can go on after `step` steps: what is past must be as it was, what is
        to come may change.

        stage: of the last of these steps, "" for none. awake: whether concept slots are. record: of the curriculum that
            they were taken
        under; None in checkpoints that have none.
        """
        if self.total < step:
            raise UserError(
                f"stages end after {self.total} steps, but the checkpoint is at step {step}; "
                f"make them longer, or set checkpoint.resume to an earlier checkpoint and run.dir to another folder"
            )
        past = [(name, start) for name, start in zip(self.names, self.starts, strict=True) if start < step]
        if record is not None:
            was = [(name, start) for name, start in zip(record.names, record.starts, strict=False) if start < step]
        else:  # all that is known is the stage
            was = past if not step or past[-1][0] == stage else [*past[:-1], (stage, past[-1][1])]
        for number, (now, then) in enumerate(zip_longest(past, was)):
            if now != then:
                raise UserError(
                    f"stages.{number} {_words(now)}, but in the checkpoint at step {step} it {_words(then)}; "
                    f"what is past cannot change: let no stage start, end or change its name before step {step}"
                )
        if awake and step < self.total and not self.at(step).align:
            raise UserError(
                f"stages go on with pretrain at step {step}, but the concept slots of the checkpoint are awake "
                f"and cannot go back to sleep; go on with align"
            )

    def at(self, step: int) -> StepSettings:
        """Stage, weights and learning rate of step 0 <= step < total."""
        index = max(i for i, start in enumerate(self.starts) if start <= step)
        weights, since = self.weights[index], step - self.starts[index]
        if step < self.sp_warmup and index == 0:
            weights = replace(weights, sp=weights.sp * (step + 1) / self.sp_warmup)
        align = self.names[index] == "align"
        return StepSettings(self.names[index], align, weights, self._lr(step, since), self._l0(step, index))

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


def _words(stage: tuple[str, int] | None) -> str:
    return "is not there" if stage is None else f"is {stage[0]} from step {stage[1]}"
