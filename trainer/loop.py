"""The visible loop: batch -> objective -> backward -> clip -> step -> record -> save."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trainer import revival
from trainer.checkpoint import RunState, Saver
from trainer.config import Config
from trainer.curriculum import Curriculum, StepSettings
from trainer.dictionary import BankWeights
from trainer.dictionary.units import CONCEPTS
from trainer.following import followed_sparsity
from trainer.gains import concept_gains
from trainer.guard import Guard
from trainer.interrupt import Interrupt
from trainer.labels import membership
from trainer.losses import weighted
from trainer.metrics import Metrics, StepSums, batch_means
from trainer.objective import MicroBatch
from trainer.run_folder import RunFolder
from trainer.strategies import Strategy, UnitState
from trainer.stream import Batch, Order, RowDigest, Sources, Stream, lanes_of_rank
from trainer.tracking import Tracker
from trainer.waking import class_means, concept_weights

log = logging.getLogger(__name__)

# Batches that the wake-up of the concept slots averages over, at most: enough for stable means of thousands of
# concepts.
WAKE_BATCHES = 256


@dataclass
class Run:
    """All that the loop works with; built by trainer.assembly, the same on all ranks but for the tracker (main rank
    only)."""

    config: Config
    folder: RunFolder
    sources: Sources
    plan: Order
    curriculum: Curriculum
    strategy: Strategy
    tracker: Tracker | None
    state: RunState
    digest: RowDigest
    guard: Guard
    saver: Saver
    interrupt: Interrupt
    metrics: Metrics = field(default_factory=Metrics)
    grad_norm: float = 0.0  # before clipping, of the last update
    outliers: int = 0  # rows of this rank that were left out for their norms and are not in the state's number yet

    def stream(self, step: int) -> Stream:
        """Batches of this rank from global step `step` on."""
        topology = self.strategy.topology
        lanes = lanes_of_rank(self.config.data.lanes, topology.data_rank, topology.data_world)
        return Stream(self.config.data, self.sources, self.plan, lanes, step, pin=topology.device.type == "cuda")

    def labelled_batches(self, step: int) -> int:
        """Batches from global step `step` on that hold an epoch of every source that names concepts, or WAKE_BATCHES
        of them."""
        named = [bool(manifest.concepts) for manifest in self.sources.manifests.values()]
        lengths = [part.order.rows_per_lane // part.share for part in self.plan.parts(step) if named[part.source]]
        return min(max(lengths, default=0), WAKE_BATCHES)


def train(run: Run) -> int:
    """Train from run.state.step to the end of the curriculum, or until a stop is asked for; save on the way and at the
    end.

    Returns 0, or the exit code of trainer.interrupt.
    """
    config, state, curriculum, saver, strategy = run.config, run.state, run.curriculum, run.saver, run.strategy
    topology = strategy.topology
    began, logged, code = time.perf_counter(), state.step, 0
    with (
        run.stream(state.step) as stream,
        tqdm(
            total=curriculum.total, initial=state.step, unit="step", disable=not topology.is_main, dynamic_ncols=True
        ) as bar,
    ):
        while state.step < curriculum.total and not code:
            settings = curriculum.at(state.step).with_sparsity(state.sparsity)
            if settings.align and not state.awake and (code := wake_concepts(run)):
                break
            rows = next(stream)
            batch = to_micro_batch(run, rows)
            if config.dictionary.freeze == "none" and config.revival.due(state.step, curriculum.total):
                revive(run, batch, settings)

            sums = StepSums(topology, config.optim.accumulate)
            for number, part in enumerate(batch.split(config.optim.accumulate), start=1):
                loss, part_sums = strategy.forward(part, settings.weights, settings.align, state.step + 1)
                strategy.backward(loss, last=number == config.optim.accumulate)
                sums.add(part_sums)
            total, (done, failed, *stops) = sums.reduce([*saver.votes(), *run.interrupt.votes()])
            clip_and_update(run, total, settings)

            run.digest.update(rows.row_ids, rows.positions)
            run.outliers += int(rows.outlier.sum())
            state.step += 1
            state.stage = settings.stage
            state.stream = stream.state()
            bar.update()
            saver.advance(done, failed)
            code = run.interrupt.code(*stops)
            if state.step % config.run.log_every == 0 or state.step == curriculum.total:
                seconds = time.perf_counter() - began
                record(run, stream, settings, seconds, state.step - logged, bar)
                stream.stall_seconds, began, logged = 0.0, time.perf_counter(), state.step
            if saver.due(state.step) or code or state.step == curriculum.total:
                save(run, stream)
        if code and saver.last_step != state.step:  # asked to stop while concept slots woke up
            save(run, stream)
        saver.wait()
    return code


def to_micro_batch(run: Run, rows: Batch) -> MicroBatch:
    """Rows of this rank on the device, with the counts of the global batch; masked rows are left out."""
    topology, form = run.strategy.topology, run.strategy.objective.form
    moved = rows.to(topology.device, non_blocking=True)
    acts, concept, answer = moved.acts, moved.concept, moved.answer
    if not bool(rows.valid.all()):
        keep = moved.valid
        acts, concept, answer = acts[keep], concept[keep], answer[keep]
    parts = [len(part) for part in torch.tensor_split(concept, run.config.optim.accumulate)]
    labels = torch.stack([form.counted(concept).sum(), (answer >= 0).sum()]).float()
    sizes = labels.new_tensor([len(concept), *parts])
    listed = membership(concept, len(run.sources.manifest.concepts)).sum(dim=0) if form.bind_balance else labels[:0]
    counts = topology.sum_over_data(torch.cat([sizes[:1], labels, sizes[1:], listed.float()]))
    part_rows, positives = counts[3:].split([len(parts), len(listed)])
    return MicroBatch(acts, concept, answer, counts[:3], None, part_rows, positives if form.bind_balance else None)


def clip_and_update(run: Run, total: dict[str, float], settings: StepSettings) -> None:
    """The optimizer's step from the gradients that were accumulated, unless the guard says no.

    `total`: sums of the global batch.
    """
    strategy, guard, norm = run.strategy, run.guard, math.nan
    loss = weighted(batch_means(total), settings.weights)
    problem = guard.problem(loss, settings.stage)
    if problem:
        strategy.discard()
    else:
        norm = strategy.update(settings.lr, run.config.optim.clip)
        problem = "" if math.isfinite(norm) else f"the gradient norm is {norm}"
    if problem:
        strategy.objective.forget()
        guard.skip(run.state.step, problem, loss, norm)
        return
    guard.accept(loss)
    run.metrics.add(total)
    run.grad_norm = norm
    run.state.updates += 1
    target, l0 = settings.l0 if total["rows"] else None, total["active"] / max(total["rows"], 1.0)
    strategy.objective.take_up(l0, target)
    if run.config.dictionary.target_l0 and target is not None and settings.weights.sp > 0:
        run.state.sparsity = followed_sparsity(run.state.sparsity, l0, target)


def wake_concepts(run: Run) -> int:
    """Set the concept slots from the class means of the rows that come next (at most one epoch of every source that
    names concepts).

    Returns 0, or the exit code when a stop was asked for meanwhile; the slots are then left asleep.
    """
    strategy, manifest = run.strategy, run.sources.manifest
    dictionary = strategy.objective.dictionary
    batches = run.labelled_batches(run.state.step)
    code = 0

    def labelled(stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal code
        for _ in range(batches):
            if code := run.interrupt.agree(strategy.topology):
                return
            batch = next(stream).to(strategy.topology.device)
            yield dictionary.normalise(batch.acts[batch.valid]), batch.concept[batch.valid]

    with run.stream(run.state.step) as stream:
        classes = class_means(labelled(stream), len(manifest.concepts), manifest.width, strategy.topology)
    if code:
        return code
    missing = [name for name, n in zip(manifest.concepts, classes.counts.tolist(), strict=True) if n == 0]
    if missing and strategy.topology.is_main:
        log.warning("no row of the training data is labelled %s; these slots stay asleep", ", ".join(missing[:10]))
    woken = {name: value.cpu() for name, value in concept_weights(classes, run.config.loss.binding).items()}
    strategy.write(CONCEPTS, UnitState(woken, {}, {}))
    run.state.woken = True
    return 0


def revive(run: Run, batch: MicroBatch, settings: StepSettings) -> None:
    """Resample dead slots and say how many."""
    dead_after, seed = run.config.revival.patience(run.curriculum.total), run.config.run.seed
    revived = revival.resample(run.strategy, batch.acts, settings.align, run.state.step, dead_after, seed)
    if revived and run.strategy.topology.is_main:
        tqdm.write(f"step {run.state.step}: {revived} dead slots got new weights")


def record(run: Run, stream: Stream, settings: StepSettings, seconds: float, steps: int, bar: Any) -> None:
    """Write the figures of the last `steps` steps to JSONL, MLflow and the progress bar."""
    patience = run.config.revival.patience(run.curriculum.total)
    dead = revival.count_dead(run.strategy, run.state.step, patience)
    tally(run, stream)
    if run.tracker is None or run.metrics.steps == 0:  # every update of the interval was skipped
        return
    line = {
        "step": run.state.step,
        "stage": settings.stage,
        **run.plan.epochs_at(run.state.step),
        "rows": run.state.step * run.config.data.global_batch,
        **run.metrics.read(settings.weights, settings.stage),
        "dead": dead / run.config.dictionary.free_slots,
        "grad_norm": run.grad_norm,
        "lr": settings.lr,
        "sp_weight": settings.weights.sp,
        "rows_per_s": steps * run.config.data.global_batch / seconds,
        "stall": stream.stall_seconds / seconds,
        "save_stall": run.saver.take_seconds() / seconds,
        "skipped_updates": run.guard.skipped,
        "outliers": run.state.outliers,
        **run.state.damage,
        "rows_digest": f"{run.state.rows_digest:016x}",
    }
    if run.strategy.topology.device.type == "cuda":
        line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    run.tracker.log(line, run.state.step)
    shown = {k: line[k] for k in ("loss", "fvu", "l0", "dead", "binding", "rows_per_s") if k in line}
    bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
    bar.set_description(settings.stage, refresh=False)


def tally(run: Run, stream: Stream) -> None:
    """Bring the row digest and the counts of outliers, of masked and of reread data up to date, over all data ranks."""
    topology, state = run.strategy.topology, run.state
    counters = stream.counters()
    mine = torch.tensor([run.digest.signed, run.outliers, *counters.values()], device=topology.device)
    digest, outliers, *counts = topology.sum_over_data(mine).tolist()
    state.outliers, run.outliers = state.outliers + outliers, 0
    state.rows_digest = RowDigest.combine([digest]).value
    # A process counts what it met itself; an earlier one may have met more.
    state.damage = {k: max(n, state.damage.get(k, 0)) for k, n in zip(counters, counts, strict=True)}


def measure_gains(run: Run) -> list[float] | None:
    """The gains of the concept slots, over as many rows as they were woken from; None where they sleep."""
    strategy, topology = run.strategy, run.strategy.topology
    state = strategy.read(CONCEPTS, everywhere=True) if run.state.awake and run.sources.manifest.concepts else None
    if state is None:
        return None
    W_enc, b_enc, W_dec = (state.weights[name].to(topology.device) for name in ("W_enc", "b_enc", "W_dec"))
    weights = BankWeights(W_enc, b_enc, W_dec)

    def labelled() -> Iterator[tuple[Tensor, Tensor]]:
        with run.stream(run.state.step) as stream:
            for _ in range(run.labelled_batches(run.state.step)):
                batch = next(stream).to(topology.device)
                row, column = ((batch.concept >= 0) & batch.valid[:, None]).nonzero(as_tuple=True)
                yield strategy.objective.dictionary.normalise(batch.acts[row]), batch.concept[row, column]

    gains = concept_gains(weights, labelled(), topology)
    if gains is None and topology.is_main:
        log.warning("the rows could not be read once more: the checkpoint holds no gains of the concept slots")
    return gains


def save(run: Run, stream: Stream) -> None:
    """Begin to write a checkpoint, or write it."""
    tally(run, stream)
    last = run.state.step == run.curriculum.total
    run.state.guard = run.guard.state()
    run.state.gains = measure_gains(run) if last else None
    run.saver.save(run.state, last=last)
