"""The visible loop: batch -> objective -> backward -> clip -> step -> record -> save."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trainer import revival
from trainer.checkpoint import Best
from trainer.curriculum import StepSettings
from trainer.dictionary import BankWeights
from trainer.dictionary.units import CONCEPTS
from trainer.gains import measure_concepts
from trainer.labels import listing, membership
from trainer.late import to_device
from trainer.stepping import Run, Step, settle, take
from trainer.strategies import UnitState
from trainer.stream import Batch, RowDigest, Stream
from trainer.sums import MicroBatch
from trainer.waking import class_means, concept_weights, exclusive_weights

log = logging.getLogger(__name__)

# In the progress bar; held-out figures are those of the last evaluation.
SHOWN = (
    "loss",
    "fvu",
    "l0",
    "dead",
    "binding",
    "rows_per_s",
    "live_tokens_per_s",
    "heldout/fvu",
    "heldout/slot_accuracy",
)


def train(run: Run) -> int:
    """Train from run.state.step to the end of the curriculum, or until a stop is asked for; save on the way and at the
    end.

    Returns 0, or the exit code of trainer.interrupt.
    """
    config, state, curriculum, saver, strategy = run.config, run.state, run.curriculum, run.saver, run.strategy
    topology = strategy.topology
    began, logged, code = time.perf_counter(), state.step, 0
    if config.dictionary.target_l0 or state.sparsity != 1.0:
        strategy.objective.sparsity = torch.tensor(state.sparsity, dtype=torch.float64, device=topology.device)
    with (
        run.stream(state.step) as stream,
        tqdm(
            total=curriculum.total, initial=state.step, unit="step", disable=not topology.is_main, dynamic_ncols=True
        ) as bar,
    ):
        while state.step < curriculum.total and not code:
            settings = curriculum.at(state.step)
            if settings.align and not state.awake:
                settle(run, everything=True)
                if code := wake_concepts(run):
                    break
            rows = next(stream)
            batch = to_micro_batch(run, rows)
            if config.dictionary.freeze == "none" and config.revival.due(state.step, curriculum.total):
                settle(run, everything=True)
                revive(run, batch, settings)

            take(run, Step(state.step, settings, batch, [*saver.votes(), *run.interrupt.votes()]))
            run.digest.update(rows.row_ids, rows.positions)
            run.outliers += int(rows.outlier.sum())
            state.step += 1
            state.stage = settings.stage
            state.stream = stream.state()
            bar.update()
            code = settle(run)
            ends = state.step == curriculum.total
            evaluates = run.evaluations.due(state.step, ends)
            logs = state.step % config.run.log_every == 0 or evaluates or ends
            if logs or saver.due(state.step) or code:
                code = settle(run, everything=True) or code
            best = run.evaluations.evaluate(strategy, saver, state.step, settings.align) if evaluates else None
            if logs:
                seconds = time.perf_counter() - began
                record(run, stream, seconds, state.step - logged, bar, evaluates)
                stream.stall_seconds, began, logged = 0.0, time.perf_counter(), state.step
            if saver.due(state.step) or code or ends or best:
                save(run, stream, best)
        if code and saver.last_step != state.step:  # asked to stop while concept slots woke up
            save(run, stream)
        saver.wait()
    return code


def to_micro_batch(run: Run, rows: Batch) -> MicroBatch:
    """Rows of this rank on the device, with the counts of the global batch; masked rows are left out.

    What is counted is counted on the host, which need not wait for it.
    """
    topology, form = run.strategy.topology, run.strategy.objective.form
    kept = rows.kept()
    concept = kept.concept
    parts = [len(part) for part in torch.tensor_split(concept, run.config.optim.accumulate)]
    labels = [int(form.counted(concept).sum()), int((kept.answer >= 0).sum())]
    listed = []
    if form.bind_balance:
        listed = membership(concept, len(run.sources.manifest.concepts)).sum(dim=0).tolist()
    mine = [float(number) for number in (len(concept), *labels, *parts, *listed)]
    counts = topology.sum_over_data(to_device(mine, torch.float32, topology.device))
    part_rows, positives = counts[3:].split([len(parts), len(listed)])
    acts, labels_there, answer = run.sender.send(kept.acts, kept.concept, kept.answer)
    return MicroBatch(
        acts,
        labels_there,
        answer,
        counts[:3],
        part_rows=part_rows,
        positives=positives if form.bind_balance else None,
        known=tuple(mine[:3]) if topology.data_world == 1 else None,
        own=(*mine[:3], float(listing(concept).sum())) if len(parts) == 1 else None,
    )


def labelled_rows(run: Run, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (x [B, D] normalised, concept [B, M]) of this data rank that concept slots are woken from and measured on:
    those of the batches that come next."""
    topology = run.strategy.topology
    with run.stream(run.state.step) as stream:
        for _ in range(batches):
            batch = next(stream).to(topology.device)
            x = run.strategy.objective.dictionary.normalise(batch.acts[batch.valid])
            yield x, batch.concept[batch.valid]


def wake_concepts(run: Run) -> int:
    """Set the concept slots from the class means of `labelled_rows`.

    Returns 0, or the exit code when a stop was asked for meanwhile; the slots are then left asleep.
    """
    strategy, manifest = run.strategy, run.sources.manifest
    code = 0

    def labelled(batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal code
        for rows in labelled_rows(run, batches):
            if code := run.interrupt.agree(strategy.topology):
                return
            yield rows

    for batches in run.labelled_batches(run.state.step):
        classes = class_means(labelled(batches), len(manifest.concepts), manifest.width, strategy.topology)
        if code:
            return code
        if bool((classes.counts > 0).all()):
            break
    if run.config.loss.binding == "softmax":
        woken = exclusive_weights(classes, partial(labelled, batches), strategy.topology)
    else:
        woken = concept_weights(classes, run.config.loss.binding)
    if code:
        return code
    missing = [name for name, n in zip(manifest.concepts, classes.counts.tolist(), strict=True) if n == 0]
    if missing and strategy.topology.is_main:
        log.warning("no row of the training data is labelled %s; these slots stay asleep", ", ".join(missing[:10]))
    strategy.write(CONCEPTS, UnitState({name: value.cpu() for name, value in woken.items()}, {}, {}))
    run.state.woken = True
    return 0


def revive(run: Run, batch: MicroBatch, settings: StepSettings) -> None:
    """Resample dead slots and say how many."""
    dead_after, seed = run.config.revival.patience(run.curriculum.total), run.config.run.seed
    revived = revival.resample(run.strategy, batch.acts, settings.align, run.state.step, dead_after, seed)
    if revived and run.strategy.topology.is_main:
        tqdm.write(f"step {run.state.step}: {revived} dead slots got new weights")


def record(run: Run, stream: Stream, seconds: float, steps: int, bar: Any, evaluated: bool) -> None:
    """Write the figures of the last `steps` steps, and where it was `evaluated` after them those of the held-out rows,
    to JSONL, MLflow and the progress bar."""
    settings = run.settings
    patience = run.config.revival.patience(run.curriculum.total)
    dead = revival.count_dead(run.strategy, run.state.step, patience)
    tally(run, stream)
    read, run.recorded_tokens = run.tokens - run.recorded_tokens, run.tokens
    skipped = run.metrics.steps == 0  # every update of the interval
    if run.tracker is None or settings is None or (skipped and not evaluated):
        return
    line = {
        "step": run.state.step,
        "stage": settings.stage,
        **run.plan.epochs_at(run.state.step),
        "rows": run.state.step * run.config.data.global_batch,
        **({} if skipped else run.metrics.read(settings.weights, settings.stage)),
        **(run.evaluations.figures if evaluated else {}),
        "dead": dead / run.config.dictionary.free_slots,
        "grad_norm": run.grad_norm,
        "lr": settings.lr,
        "sp_weight": settings.weights.sp,
        "rows_per_s": steps * run.config.data.global_batch / seconds,
        "stall": stream.stall_seconds / seconds,
        "save_stall": run.saver.take_seconds() / seconds,
        "skipped_updates": run.guard.skipped,
        "outliers": run.state.outliers,
        **({"retaken_steps": run.cramped} if run.cramped else {}),
        **run.state.damage,
        "rows_digest": f"{run.state.rows_digest:016x}",
    }
    if run.sources.computers:
        line["live_tokens_per_s"] = read / seconds
    if run.strategy.topology.device.type == "cuda":
        line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    run.tracker.log(line, run.state.step)
    figures = run.evaluations.figures | line
    shown = {name: figures[name] for name in SHOWN if name in figures}
    bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
    bar.set_description(settings.stage, refresh=False)


def tally(run: Run, stream: Stream) -> None:
    """Bring the row digest and the counts of tokens, of outliers, of masked and of reread data up to date, over all
    data ranks."""
    topology, state = run.strategy.topology, run.state
    counters = stream.counters()
    mine = torch.tensor(
        [run.digest.signed, run.sources.tokens, run.outliers, *counters.values()], device=topology.device
    )
    digest, run.tokens, outliers, *counts = topology.sum_over_data(mine).tolist()
    state.outliers, run.outliers = state.outliers + outliers, 0
    state.rows_digest = RowDigest.combine([digest]).value
    # A process counts what it met itself; an earlier one may have met more.
    state.damage = {k: max(n, state.damage.get(k, 0)) for k, n in zip(counters, counts, strict=True)}


def measure_slots(run: Run) -> None:
    """Note the gains of the concept slots that are awake, over as many rows as they were woken from; where the free
    slots are held also what the concept slots write, since their decoder rows learn to add nothing to a reconstruction
    that is there already."""
    strategy, topology = run.strategy, run.strategy.topology
    state = strategy.read(CONCEPTS, everywhere=True) if run.state.awake and run.sources.manifest.concepts else None
    if state is None:
        return
    W_enc, b_enc, W_dec = (state.weights[name].to(topology.device) for name in ("W_enc", "b_enc", "W_dec"))
    weights = BankWeights(W_enc, b_enc, W_dec)

    for batches in run.labelled_batches(run.state.step):
        found = measure_concepts(weights, labelled_rows(run, batches), topology, run.config.loss.binding)
        if found is None or found.complete:
            break
    if found is None:
        if topology.is_main:
            log.warning("the rows could not be read once more: the checkpoint holds no gains of the concept slots")
        return
    run.state.gains = found.gains
    if run.config.dictionary.freeze == "free":
        strategy.write(CONCEPTS, UnitState({"W_write": found.written.cpu()}, {}, {}))


def save(run: Run, stream: Stream, best: Best | None = None) -> None:
    """Begin to write a checkpoint, or write it."""
    tally(run, stream)
    last = run.state.step == run.curriculum.total
    run.state.guard = run.guard.state()
    run.state.gains = None
    if last or best:  # the ones that are steered with
        measure_slots(run)
    run.saver.save(run.state, last=last, best=best)
