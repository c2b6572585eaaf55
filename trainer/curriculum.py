"""The two stages of AlignSAE: schedules as pure functions of the step, and how concept slots wake up at the switch.

Steps are counted from 0: step s is the update from batch s.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.losses import LossConfig
from trainer.optimizer import OptimConfig
from trainer.topology import Topology


@dataclass
class StageConfig:
    """One stage: its name, its length in epochs or steps (one of them), and loss settings that differ from `loss`."""

    name: str = "pretrain"
    epochs: float | None = None
    steps: int | None = None
    loss: dict[str, Any] = field(default_factory=dict)

    def length(self, steps_per_epoch: int) -> int:
        """Steps of the stage. Raises UserError unless exactly one of epochs and steps is given."""
        if (self.epochs is None) == (self.steps is None):
            raise UserError(f"stage {self.name!r} needs exactly one of epochs and steps")
        steps = self.steps if self.steps is not None else round((self.epochs or 0) * steps_per_epoch)
        if steps < 1:
            raise UserError(f"stage {self.name!r} has {steps} steps; give it at least 1")
        return steps


@dataclass(frozen=True)
class Point:
    """What the curriculum says about one step."""

    stage: str
    align: bool  # concept slots are awake
    wakes: bool  # concept slots wake up right before this step
    weights: LossConfig
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
        if not stages:
            raise UserError(
                "stages is empty; give at least one of {name: pretrain, epochs: N} and {name: align, epochs: N}"
            )
        for stage in stages:
            if stage.name not in ("pretrain", "align"):
                raise UserError(f"stage {stage.name!r} is unknown; use pretrain or align")
        names = [stage.name for stage in stages]
        if "align" in names and "pretrain" in names[names.index("align") :]:
            raise UserError("stage pretrain follows align; concept slots that are awake cannot go back to sleep")
        self.optim = optim
        self.losses = [loss.override(stage.loss) for stage in stages]
        for weights in self.losses:
            weights.validate()
        self.names = names
        self.starts = [0]
        for stage in stages:
            self.starts.append(self.starts[-1] + stage.length(steps_per_epoch))
        self.total = self.starts.pop()

    def at(self, step: int) -> Point:
        """Stage, weights and learning rate of step 0 <= step < total."""
        index = max(i for i, start in enumerate(self.starts) if start <= step)
        weights, since = self.losses[index], step - self.starts[index]
        if index == 0 and since < weights.sp_warmup:
            weights = replace(weights, sp=weights.sp * (since + 1) / weights.sp_warmup)
        align = self.names[index] == "align"
        wakes = align and since == 0 and "align" not in self.names[:index]
        return Point(self.names[index], align, wakes, weights, self._lr(step, since))

    def _lr(self, step: int, since: int) -> float:
        warm = min(1.0, (since + 1) / (self.optim.warmup + 1))
        left = (self.total - step) / max(self.total * self.optim.decay, 1e-9)
        return self.optim.lr * warm * min(1.0, left)


@dataclass(frozen=True)
class ClassMeans:
    """Mean normalised activation of each concept, means [R, D], over counts [R] rows of all data ranks."""

    means: Tensor
    counts: Tensor


def class_means(batches: Iterable[tuple[Tensor, Tensor]], concepts: int, width: int, topology: Topology) -> ClassMeans:
    """From (x [B, D], concept [B]) of this data rank's rows, summed in double over all data ranks."""
    sums = torch.zeros(concepts, width + 1, dtype=torch.float64, device=topology.device)
    for x, concept in batches:
        labelled = concept >= 0
        rows = torch.cat([x[labelled].double(), torch.ones_like(x[labelled][:, :1], dtype=torch.float64)], dim=1)
        sums.index_add_(0, concept[labelled], rows)
    topology.sum_over_data(sums)
    counts = sums[:, -1]
    return ClassMeans((sums[:, :-1] / counts.clamp_min(1)[:, None]).float(), counts)


def concept_slots(classes: ClassMeans, gain: float = 1.0) -> dict[str, Tensor]:
    """W_enc [R, D], b_enc [R] and W_dec [R, D] of slots that wake up.

    With d_r = mean of concept r minus the mean over concepts, slot r has pre-activation +gain at its own mean and -gain at the mean over
    concepts, and gain times its decoder row is d_r: it starts alive, on its concept alone. A concept without rows stays at zero.
    """
    seen = classes.counts > 0
    centre = classes.means[seen].mean(dim=0) if seen.any() else torch.zeros_like(classes.means[:1]).sum(dim=0)
    difference = torch.where(seen[:, None], classes.means - centre, torch.zeros_like(classes.means))
    square = difference.square().sum(dim=1).clamp_min(1e-12)
    encoder = 2.0 * gain * difference / square[:, None]
    bias = torch.where(seen, -(encoder @ centre) - gain, torch.zeros_like(square))
    return {"W_enc": encoder, "b_enc": bias, "W_dec": difference / gain}
