"""Builds a run from its inputs: what ranks agree on, in which order, and how the parts are put together."""

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import nn

from trainer import checkpoint, extraction, pretrained
from trainer.agreement import decide
from trainer.beginning import begin_along_rows
from trainer.config import Config, flatten, load_config, to_yaml
from trainer.dictionary import ConceptDictionary, bank_number, initial_share
from trainer.errors import UserError
from trainer.extraction import Live
from trainer.files import write_atomically
from trainer.guard import Guard
from trainer.heldout import Evaluations, read_parts
from trainer.inputs import Inputs
from trainer.interrupt import Interrupt
from trainer.journal import Journal
from trainer.kernels import usable_precision
from trainer.late import Late, Sender
from trainer.objective import AlignObjective
from trainer.ownership import Ownership
from trainer.redact import redact
from trainer.run_folder import RunFolder
from trainer.stepping import Run
from trainer.strategies import Layout, ParallelConfig, Strategy, build_strategy, join, owned_banks
from trainer.strategies.layout import LONGEST_TIMEOUT
from trainer.stream import RowDigest
from trainer.topology import Topology, limit_waiting
from trainer.tracking import DatasetInput, Tracker

log = logging.getLogger(__name__)


def open_live(config: Config) -> Live | None:
    """What computes the sources that are live, None where none is. Called on all ranks, which meet for it."""
    if not config.data.computed():
        return None
    # Making tokens of a corpus takes longer than a step; the ranks meet again, and with their own patience.
    topology = join(Layout("ddp", timeout=LONGEST_TIMEOUT))
    return extraction.open_live(config.data, RunFolder(Path(config.run.dir)).live, topology)


def build_run(inputs: Inputs, live: Live | None, interrupt: Interrupt, ending: ExitStack) -> Run:
    """Form the process group, find what there is to resume, and build everything that the loop works with.

    live: what `inputs` were read with. ending: closed when the run is over; until then it keeps the run folder owned.
    """
    config = inputs.config
    folder = RunFolder(Path(config.run.dir))
    topology = join(inputs.layout, inputs.facts())
    own(folder, topology, ending)
    resume, state = find_state(inputs, folder, topology)
    evaluations = read_heldout(inputs, topology)
    strategy = build_strategy(inputs.layout, topology)
    strategy.prepare(build_objective(inputs, strategy, resume), config.optim, state.updates)
    limit_waiting(inputs.layout.timeout)
    if resume is not None:
        checkpoint.load_moments(resume, strategy)
    store_manifests(live, folder, topology)
    tracker = open_tracker(inputs, folder, state.step, topology)
    journal = Journal(folder.skipped, state.step) if topology.is_main else None
    run = Run(
        config=config,
        folder=folder,
        sources=inputs.sources,
        plan=inputs.plan,
        curriculum=inputs.curriculum,
        strategy=strategy,
        tracker=tracker,
        state=state,
        # The chain goes on from the saved value on one rank; those of the others start at 0 (they add up).
        digest=RowDigest(state.rows_digest if topology.data_rank == 0 else 0),
        guard=Guard(config.guard, inputs.plan, journal, state.guard, topology.device),
        late=Late(topology.lag),
        sender=Sender(topology.device),
        saver=checkpoint.Saver(
            folder.checkpoints, config.checkpoint, strategy, inputs.manifest, trusted=resume, best=state.best
        ),
        interrupt=interrupt,
        evaluations=evaluations,
    )
    if resume is None and config.dictionary.begin == "rows":
        with run.stream(0) as batches:
            begin_along_rows(strategy, batches, initial_share(inputs.form, config.dictionary.initial_l0))
    return run


def own(folder: RunFolder, topology: Topology, ending: ExitStack) -> None:
    """Take the run folder for the main rank.

    Raises AgreedError on all ranks when another run has it. Called on all ranks.
    """
    problem = ""
    if topology.is_main:
        try:
            ending.enter_context(Ownership(folder.path))
        except UserError as error:
            problem = str(error)
    decide(problem, topology)


def store_manifests(live: Live | None, folder: RunFolder, topology: Topology) -> None:
    """Keep the manifests that were made for this run: it goes on with them. Called on all ranks."""
    problem = ""
    if live is not None and topology.is_main:
        try:
            live.store(folder.live)
        except OSError as error:
            problem = f"run.dir={folder.path} cannot be written ({error.strerror}); choose another folder"
    decide(problem, topology)


def find_state(inputs: Inputs, folder: RunFolder, topology: Topology) -> tuple[Path | None, checkpoint.RunState]:
    """The checkpoint to go on from, or None, and the state of the run there. Called on all ranks."""
    config = inputs.config
    resume, skipped = checkpoint.find(config.checkpoint.resume, folder.checkpoints, topology)
    fresh = checkpoint.RunState.fresh(config.run.seed, inputs.form, config.dictionary.freeze)
    state = fresh if resume is None else resumed_state(resume, inputs)
    if config.checkpoint.resume != "auto":
        checkpoint.refuse_later(folder.checkpoints, state.step)
    if topology.is_main:
        for reason in skipped:
            log.warning("checkpoint skipped: %s", reason)
        if resume is not None:
            log.info("resuming from %s at step %d of %d", resume, state.step, inputs.curriculum.total)
            log_changes(resume, state, inputs)
    state.curriculum = inputs.curriculum.record()
    state.best = kept_best(state.best, config.checkpoint.best, folder, topology)
    return resume, state


def read_heldout(inputs: Inputs, topology: Topology) -> Evaluations:
    """The held-out rows, where they are to be evaluated."""
    config, every = inputs.config, inputs.config.run.evaluate_every
    parts = read_parts(config.data, inputs.heldout, inputs.sources, topology) if every else []
    most = max(1, config.data.global_batch // topology.data_world)
    return Evaluations(parts, every, most, config.checkpoint.best, "align" in inputs.curriculum.names)


def kept_best(
    best: checkpoint.Best | None, metric: str | None, folder: RunFolder, topology: Topology
) -> checkpoint.Best | None:
    """The best evaluation that a checkpoint knows of, if it is by the same figure and its own checkpoint is still in
    this run folder. Called on all ranks."""
    lost = best is None or best.metric != metric or not checkpoint.is_complete(folder.checkpoints, best.step)
    return None if topology.any_over_world(lost) else best


def log_changes(resume: Path, state: checkpoint.RunState, inputs: Inputs) -> None:
    """Say which settings are not those of the run that the checkpoint is of."""
    new = inputs.curriculum.record()
    if state.curriculum is not None and state.curriculum != new:
        log.info("resumed with other stages: %s; they were %s", new.describe(), state.curriculum.describe())
    try:
        old = flatten(load_config(RunFolder(resume.parents[1]).config, []))
    except UserError:  # an older version's, or the checkpoint is alone
        return
    now = flatten(shown(inputs))
    for key in sorted((old.keys() | now.keys()) - {"run.dir", "checkpoint.resume"}):
        if old.get(key) != now.get(key):
            log.info("resumed with %s=%s; it was %s", key, _shortened(now.get(key)), _shortened(old.get(key)))


def shown(inputs: Inputs) -> Config:
    """The configuration as it is kept and shown elsewhere.

    Without credentials and signed queries, and with what `auto` and the launch file came to.
    """
    config = inputs.config
    data = config.data
    sources = {
        name: replace(source, shards=redact(source.shards), heldout=redact(source.heldout))
        for name, source in data.sources.items()
    }
    return replace(
        config,
        data=replace(data, shards=redact(data.shards), heldout=redact(data.heldout), sources=sources),
        parallel=ParallelConfig(**vars(inputs.layout)),
        checkpoint=replace(config.checkpoint, resume=redact(config.checkpoint.resume)),
        tracking=config.tracking.redacted(),
    )


def resumed_state(folder: Path, inputs: Inputs) -> checkpoint.RunState:
    """The state of a checkpoint, if it fits configuration and data. Raises UserError naming what differs."""
    state, seed = checkpoint.read_state(folder), inputs.config.run.seed
    if different := state.dictionary.difference(inputs.form):
        key, theirs, wanted = different
        raise UserError(
            f"checkpoint {folder} has {key}={_shortened(theirs)} but this run has {_shortened(wanted)}; "
            f"use the configuration and data it was made with, or checkpoint.resume=none and another run.dir"
        )
    if state.freeze != (freeze := inputs.config.dictionary.freeze):
        raise UserError(
            f"checkpoint {folder} was made with dictionary.freeze={state.freeze}, not {freeze}, and the optimizer's "
            f"state would not fit; to train on from it, `alignsae import` it and name that in dictionary.start_from"
        )
    if state.seed != seed:
        raise UserError(
            f"checkpoint {folder} was made with run.seed={state.seed}, not {seed}; the order of rows would change"
        )
    inputs.plan.resume(state.stream)
    inputs.curriculum.refuse_other_past(state.step, state.stage, state.awake, state.curriculum)
    state.woken = state.awake
    return state


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def build_objective(inputs: Inputs, strategy: Strategy, resume: Path | None) -> AlignObjective:
    """The dictionary and its loss.

    Each unit is made, loaded and placed before the next one, so that a rank never holds more than its strategy does.
    """
    config, topology, kernels = inputs.config, strategy.topology, []
    chosen = config.dictionary
    start = pretrained.Start(chosen, inputs.manifest) if resume is None and chosen.start_from else None

    def load_and_place(name: str, unit: nn.Module) -> None:
        if resume is not None:
            kernel = checkpoint.load_unit(resume, name, unit)
            if bank_number(name) is not None:
                kernels.append(kernel or "dense")
        elif start is not None:
            start.fill(name, unit, inputs.form)
        if chosen.freeze == "free" and bank_number(name) is not None:
            unit.requires_grad_(False)
        strategy.place(unit)

    dictionary = ConceptDictionary(
        inputs.form,
        initial_l0=chosen.initial_l0,
        initial_norm=chosen.initial_norm,
        seed=config.run.seed,
        owned=owned_banks(inputs.form.banks, topology),
        on_unit=load_and_place,
    )
    dictionary.set_normalisation(inputs.manifest.mean, inputs.manifest.scale)
    return AlignObjective(
        dictionary.to(topology.device),
        topology,
        form=config.loss.form(),
        kernel=config.kernel,
        precision=agreed_precision(config.run.precision, topology),
        kernels=kernels if resume is not None else None,
        dead_after=config.revival.patience(inputs.curriculum.total),
    )


def agreed_precision(precision: str, topology: Topology) -> str:
    """What every rank can compute in: ranks that share a dictionary must round alike."""
    if not topology.any_over_world(usable_precision(precision, topology.device) != precision):
        return precision
    log.info("run.precision=%s: this CPU, or that of another rank, would emulate bf16; products are fp32", precision)
    return "fp32"


def open_tracker(inputs: Inputs, folder: RunFolder, step: int, topology: Topology) -> Tracker | None:
    """The run folder with config.yaml, and the tracker of the main rank."""
    if not topology.is_main:
        return None
    config, manifest = inputs.config, inputs.manifest
    kept = shown(inputs)
    tags = {
        "manifest_digest": manifest.digest,
        "hook_point": manifest.hook_point,
        "model": manifest.model,
        "world_size": str(topology.world),
        "device": topology.device.type,
        "strategy": inputs.layout.strategy,
    }
    manifests = inputs.sources.manifests.values()
    shards = [
        DatasetInput(key.removesuffix(".shards") if kept.data.sources else key, location, one.digest, one.rows)
        for (key, location), one in zip(kept.data.locations().items(), manifests, strict=True)
    ]
    held = zip(kept.data.heldout_locations().items(), inputs.heldout.values(), strict=True)
    shards += [DatasetInput(key, location, one.digest, one.rows, "evaluation") for (key, location), one in held]
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.config, to_yaml(kept).encode())
        tracker = Tracker(folder.path, config.tracking, flatten(kept), tags, step, inputs=shards)
        folder.outcome.unlink(missing_ok=True)  # of an earlier attempt
    except OSError as error:
        raise UserError(f"run.dir={folder.path} cannot be written ({error.strerror}); choose another folder") from error
    tracker.artifact(folder.config)
    return tracker
