"""When held-out rows are evaluated, and which evaluation is the best so far."""

import logging
import time
from collections.abc import Mapping, Sequence

from trainer.checkpoint import Best, Saver
from trainer.errors import UserError
from trainer.heldout.figures import LARGER_IS_BETTER, PREFIX, heldout_figures
from trainer.heldout.rows import Part
from trainer.strategies import Strategy
from trainer.stream import DataConfig, Manifest

log = logging.getLogger(__name__)


def check_evaluation(
    data: DataConfig, every: int, best: str | None, aligns: bool, manifests: Mapping[str, Manifest]
) -> None:
    """Raise UserError unless run.evaluate_every and checkpoint.best can be had from these held-out rows.

    aligns: whether there are concept slots that wake up. manifests: of the held-out folders.
    """
    keys = list(data.heldout_locations())
    if every and not keys:
        wanted = "data.sources.NAME.heldout" if data.sources else "data.heldout"
        raise UserError(f"run.evaluate_every={every} needs held-out rows: set {wanted}, or evaluate_every=0")
    if best is None:
        return
    if not every:
        raise UserError(f"checkpoint.best={best!r:.80} needs evaluations: set run.evaluate_every and held-out rows")
    each = [key.split(".")[2] for key in keys] if len(keys) > 1 else []
    labelled = any(manifest.concepts for manifest in manifests.values())
    figures = ["fvu", *(["text_firing"] if aligns else [])]
    if aligns and labelled:
        figures = list(LARGER_IS_BETTER)
    possible = [*(PREFIX + name for name in figures), *(f"{PREFIX}{name}/fvu" for name in each)]
    if best not in possible:
        raise UserError(f"checkpoint.best={best!r:.80} is no figure of this run; use one of {', '.join(possible)}")


class Evaluations:
    """The evaluations of a run. All methods are called on all ranks.

    Args:
        parts: held-out rows by source.
        every: steps between evaluations; 0: there are none.
        most: rows of a forward pass on a rank.
        best: figure that decides which checkpoint is the best; None: none is.
        aligns: whether concept slots wake up in this run; while they sleep, no checkpoint is the best.
    """

    def __init__(self, parts: Sequence[Part], every: int, most: int, best: str | None, aligns: bool):
        self.parts, self.every, self.most, self.metric, self.aligns = parts, every, most, best, aligns
        self.figures: dict[str, float] = {}  # of the last evaluation, as metrics.jsonl names them

    def due(self, step: int, ends: bool) -> bool:
        """Whether the rows are evaluated after `step` steps; `ends`: these are all steps of the run."""
        return self.every > 0 and (ends or step % self.every == 0)

    def evaluate(self, strategy: Strategy, saver: Saver, step: int, align: bool) -> Best | None:
        """Fill `figures`; returns this evaluation where none was better so far: its checkpoint is to be kept."""
        began = time.perf_counter()
        self.figures = heldout_figures(strategy, self.parts, align, self.most)
        self.figures["evaluation_s"] = time.perf_counter() - began
        if self.metric is None or align != self.aligns:
            return None
        if self.metric not in self.figures:
            if strategy.topology.is_main:
                log.warning("no held-out row tells %s at step %d: it chooses no checkpoint", self.metric, step)
            return None
        value, before = self.figures[self.metric], saver.best_so_far()
        better = before is None or is_as_good(self.metric, value, before.value)
        # Ranks may differ in the last bit, and must decide alike.
        return Best(self.metric, value, step) if strategy.topology.any_over_world(better) else None


def is_as_good(metric: str, value: float, as_this: float) -> bool:
    """Whether a value of this figure is as good as another one, or better. Of equals the later is kept: where few rows
    tell a figure it is soon the best it can be, long before slots write what they read."""
    return value >= as_this if LARGER_IS_BETTER[metric.rpartition("/")[2]] else value <= as_this
