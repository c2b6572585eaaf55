"""The visible loop: batch -> objective -> backward -> clip -> step -> record -> save."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trainer import checkpoint, revival
from trainer.config import Config
from trainer.curriculum import Curriculum, Point, class_means, concept_slots
from trainer.metrics import Metrics
from trainer.objective import Rows
from trainer.strategies import Strategy, UnitState
from trainer.stream import Batch, Manifest, Plan, RowDigest, Stream, lanes_of_rank
from trainer.tracking import Tracker

log = logging.getLogger(__name__)

# Batches that the wake-up of the concept slots averages over, at most: enough for stable means of thousands of concepts.
WAKE_BATCHES = 256


@dataclass
class Run:
    """All that the loop works with; built by trainer.train, the same on all ranks but for the tracker (main rank only)."""

    config: Config
    folder: Path
    manifest: Manifest
    plan: Plan
    curriculum: Curriculum
    strategy: Strategy
    tracker: Tracker | None
    state: checkpoint.RunState
    digest: RowDigest
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.strategy.topology)

    def stream(self, step: int) -> Stream:
        """Batches of this rank from global step `step` on."""
        topology = self.strategy.topology
        lanes = lanes_of_rank(self.config.data.lanes, topology.data_rank, topology.data_world)
        return Stream(self.config.data, self.manifest, self.plan, lanes, step, pin=topology.device.type == "cuda")


def train(run: Run) -> None:
    """Train from run.state.step to the end of the curriculum, saving on the way and at the end."""
    config, state, curriculum = run.config, run.state, run.curriculum
    began, logged = time.perf_counter(), state.step
    is_main = run.strategy.topology.is_main
    with (
        run.stream(state.step) as stream,
        tqdm(total=curriculum.total, initial=state.step, unit="step", disable=not is_main, dynamic_ncols=True) as bar,
    ):
        while state.step < curriculum.total:
            point = curriculum.at(state.step)
            if point.wakes:
                wake_concepts(run)
            batch = next(stream)
            rows = to_rows(batch, run)
            if config.revival.due(state.step, curriculum.total):
                revive(run, rows, point)

            norm = update(run, rows, point)
            run.digest.update(batch.row_ids, batch.positions)
            state.step += 1
            state.stage = point.stage
            state.stream = stream.state()
            bar.update()

            if state.step % config.run.log_every == 0 or state.step == curriculum.total:
                seconds = time.perf_counter() - began
                record(run, point, norm, seconds, stream.stall_seconds / seconds, state.step - logged, bar)
                stream.stall_seconds, began, logged = 0.0, time.perf_counter(), state.step
            if state.step == curriculum.total or (
                config.checkpoint.every and state.step % config.checkpoint.every == 0
            ):
                save(run)


def to_rows(batch: Batch, run: Run) -> Rows:
    """A batch on the device with the counts of the global batch; masked rows are left out."""
    topology = run.strategy.topology
    moved = batch.to(topology.device, non_blocking=True)
    acts, concept, answer = moved.acts, moved.concept, moved.answer
    if not bool(batch.valid.all()):
        keep = moved.valid
        acts, concept, answer = acts[keep], concept[keep], answer[keep]
    counts = torch.stack([torch.ones_like(concept).sum(), (concept >= 0).sum(), (answer >= 0).sum()]).float()
    return Rows(acts, concept, answer, topology.sum_over_data(counts))


def update(run: Run, rows: Rows, point: Point) -> float:
    """One step of the optimizer from one batch, in `optim.accumulate` micro-batches. Returns the gradient norm before clipping."""
    strategy, optim = run.strategy, run.config.optim
    parts = list(micro_batches(rows, optim.accumulate))
    for number, part in enumerate(parts):
        loss, sums = strategy.forward(part, point.weights, point.align, run.state.step + 1)
        strategy.backward(loss, last=number == len(parts) - 1)
        run.metrics.add(sums, micro_batches=len(parts))
    run.metrics.close_step()
    norm = strategy.update(point.lr, optim.clip)
    if torch.isfinite(torch.tensor(norm)):
        run.state.updates += 1
    return norm


def micro_batches(rows: Rows, parts: int) -> Iterator[Rows]:
    """`parts` slices of the rows, with the counts of the whole batch: means do not depend on the slicing."""
    if parts == 1:
        yield rows
        return
    pieces = zip(*(torch.tensor_split(t, parts) for t in (rows.acts, rows.concept, rows.answer)), strict=True)
    for acts, concept, answer in pieces:
        yield Rows(acts, concept, answer, rows.counts)


def wake_concepts(run: Run) -> None:
    """Set the concept slots from the class means of the rows that come next (at most one epoch)."""
    strategy, manifest = run.strategy, run.manifest
    dictionary = strategy.objective.dictionary
    batches = min(run.plan.steps_per_epoch, WAKE_BATCHES)

    def labelled(stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(batches):
            batch = next(stream).to(strategy.topology.device)
            yield dictionary.normalise(batch.acts[batch.valid]), batch.concept[batch.valid]

    with run.stream(run.state.step) as stream:
        classes = class_means(labelled(stream), len(manifest.concepts), manifest.width, strategy.topology)
    missing = [name for name, n in zip(manifest.concepts, classes.counts.tolist(), strict=True) if n == 0]
    if missing and strategy.topology.is_main:
        log.warning("no row of the training data is labelled %s; these slots stay asleep", ", ".join(missing[:10]))
    strategy.write("concepts", UnitState({k: v.cpu() for k, v in concept_slots(classes).items()}, {}, {}))


def revive(run: Run, rows: Rows, point: Point) -> None:
    """Resample dead slots and say how many."""
    settings = run.config.revival
    revived = revival.resample(
        run.strategy, rows.acts, point.align, run.state.step, settings.dead_after, run.config.run.seed
    )
    if revived and run.strategy.topology.is_main:
        tqdm.write(f"step {run.state.step}: {revived} dead slots got new weights")


def record(run: Run, point: Point, norm: float, seconds: float, stall: float, steps: int, bar: Any) -> None:
    """Reduce the figures of the last `steps` steps and write them to JSONL, MLflow and the progress bar."""
    topology = run.strategy.topology
    figures = run.metrics.read(point.weights)
    dead = revival.count_dead(run.strategy, run.state.step, run.config.revival.dead_after)
    run.state.rows_digest = global_digest(run)
    if run.tracker is None:
        return
    free_slots = run.config.dictionary.free_slots
    line = {
        "step": run.state.step,
        "stage": point.stage,
        "epoch": run.state.step / run.plan.steps_per_epoch,
        "rows": run.state.step * run.config.data.global_batch,
        **figures,
        "dead": dead / free_slots,
        "grad_norm": norm,
        "lr": point.lr,
        "rows_per_s": steps * run.config.data.global_batch / seconds,
        "stall": stall,
        "rows_digest": f"{run.state.rows_digest:016x}",
    }
    if topology.device.type == "cuda":
        line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    run.tracker.log(line, run.state.step)
    shown = {k: line[k] for k in ("loss", "fvu", "l0", "dead", "binding", "rows_per_s")}
    bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
    bar.set_description(point.stage, refresh=False)


def global_digest(run: Run) -> int:
    """Digest of the rows of all global batches so far, from the chains of the data ranks."""
    topology = run.strategy.topology
    total = topology.sum_over_data(torch.tensor(run.digest.signed, device=topology.device))
    return RowDigest.combine([int(total)]).value


def save(run: Run) -> Path:
    """Write a checkpoint."""
    run.state.rows_digest = global_digest(run)
    root = run.folder / "checkpoints"
    return checkpoint.save(root, run.strategy, run.state, run.manifest, run.config.checkpoint.keep)
