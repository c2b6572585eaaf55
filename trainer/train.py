"""Train a concept-aligned dictionary: `accelerate launch -m trainer.train --config configs/X.yaml key=value ...`.

key=value overrides the YAML, for example data.shards=data/demo/layer-01/train dictionary.free_slots=16384 stages.1.epochs=40.
"""

import argparse
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

from trainer import checkpoint, loop
from trainer.allocator import keep_freed_memory
from trainer.config import Config, flatten, load_config, to_yaml
from trainer.curriculum import Curriculum
from trainer.dictionary import ConceptDictionary, bank_sizes
from trainer.errors import DataError, UserError
from trainer.guard import Guard
from trainer.interrupt import Interrupt
from trainer.journal import Journal
from trainer.kernels import usable_precision
from trainer.objective import AlignObjective
from trainer.strategies import Strategy, build_strategy, join, owned_banks
from trainer.stream import Manifest, Plan, RowDigest, lanes_of_rank
from trainer.stream.location import redact
from trainer.stream.manifest import write_atomically
from trainer.topology import Topology, launched_world
from trainer.tracking import Tracker

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"


def main(argv: list[str] | None = None) -> int:
    """Parse, train, and turn bad input into one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="trainer.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    args = parser.parse_args(argv)
    keep_freed_memory()
    rank, _, world = launched_world()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format=f"%(levelname)s rank {rank}/{world}: %(message)s"
    )
    with Interrupt() as interrupt:
        try:
            return run(load_config(args.config, args.overrides), interrupt)
        except UserError as error:
            who = f"rank {rank}: " if world > 1 else ""
            print(f"trainer.train: {who}error: {error}", file=sys.stderr)
            return 2


def run(config: Config, interrupt: Interrupt) -> int:
    """Build everything that the configuration names, resume if there is something to resume, and train.

    Returns the exit code: 0, or one of trainer.interrupt.
    """
    _, _, world = launched_world()
    # All refusals that need no other rank come before any process group forms.
    banks = len(bank_sizes(config.dictionary.free_slots, config.dictionary.bank_slots))
    config.parallel = config.parallel.resolve(world, banks)
    config.optim.refuse_sharding(config.parallel.zero_stage)
    manifest = Manifest.load(config.data.shards, allow_pipe=config.data.allow_pipe)
    plan = Plan(manifest, config.run.seed, config.data.global_batch, config.data.lanes, config.data.window)
    lanes_of_rank(config.data.lanes, 0, world // config.parallel.dictionary_ranks)
    curriculum = Curriculum(config.stages, config.loss, config.optim, plan.steps_per_epoch)
    check_labels(curriculum, manifest)
    interrupt.limit(config.run.wall_minutes)
    folder = Path(config.run.dir)

    topology = join(config.parallel)
    if not topology.agree(int(manifest.digest[:15], 16)):
        raise DataError(
            f"ranks read different manifests at data.shards={redact(config.data.shards)}; give all the same copy"
        )
    resume, skipped = checkpoint.find(config.checkpoint.resume, folder / "checkpoints", topology)
    state = fresh_state(config, manifest) if resume is None else resumed_state(resume, config, manifest, plan)
    if config.checkpoint.resume != "auto":
        checkpoint.refuse_later(folder / "checkpoints", state.step)
    for reason in skipped if topology.is_main else []:
        log.warning("checkpoint skipped: %s", reason)
    if resume is not None and topology.is_main:
        log.info("resuming from %s at step %d of %d", resume, state.step, curriculum.total)
    strategy = build_strategy(config.parallel, topology)
    strategy.prepare(build_objective(config, manifest, strategy, banks, resume), config.optim, state.updates)
    if resume is not None:
        checkpoint.load_moments(resume, strategy)

    tracker = open_tracker(config, folder, manifest, state.step, topology)
    journal = Journal(folder / "skipped.jsonl", state.step) if topology.is_main else None
    guard = Guard(config.guard, plan, journal, state.guard)
    saver = checkpoint.Saver(folder / "checkpoints", config.checkpoint, strategy, manifest, trusted=resume)
    # The chain goes on from the saved value on one rank; those of the others start at 0 (they add up).
    digest = RowDigest(state.rows_digest if topology.data_rank == 0 else 0)
    built = loop.Run(
        config, folder, manifest, plan, curriculum, strategy, tracker, state, digest, guard, saver, interrupt
    )
    code, status = 2, "failed"
    try:
        code = loop.train(built)
        status = "interrupted" if code else "finished"
    finally:
        saver.close()
        if tracker is not None:
            write_outcome(folder, tracker, summarise(status, code, built))
    topology.barrier()  # the launcher ends all ranks when one has left
    return code


def build_objective(
    config: Config, manifest: Manifest, strategy: Strategy, banks: int, resume: Path | None
) -> AlignObjective:
    """The dictionary and its loss. Each unit is made, loaded and placed before the next one, so that a rank never holds more than its strategy does."""
    topology, kernels = strategy.topology, []

    def load_and_place(name: str, unit: nn.Module) -> None:
        if resume is not None:
            kernel = checkpoint.load_unit(resume, name, unit)
            kernels.extend([kernel or "dense"] if name.startswith("bank-") else [])
        strategy.place(unit)

    dictionary = ConceptDictionary(
        manifest.width,
        manifest.concepts,
        config.dictionary,
        answers=len(manifest.answers),
        seed=config.run.seed,
        owned=owned_banks(banks, topology),
        on_unit=load_and_place,
    )
    dictionary.set_normalisation(manifest.mean, manifest.scale)
    precision = agreed_precision(config.run.precision, topology)
    objective = AlignObjective(
        dictionary.to(topology.device), config.loss, topology, kernel=config.kernel, precision=precision
    )
    if resume is not None and not objective.choice.pinned:
        # A checkpoint may come from a machine with another fast kernel.
        objective.choice.names = ["dense" if name == "dense" else objective.choice.fast for name in kernels]
    return objective


def agreed_precision(precision: str, topology: Topology) -> str:
    """What every rank can compute in: ranks that share a dictionary must round alike."""
    if not topology.any_over_world(usable_precision(precision, topology.device) != precision):
        return precision
    log.info("run.precision=%s: this CPU, or that of another rank, would emulate bf16; products are fp32", precision)
    return "fp32"


def summarise(status: str, code: int, built: loop.Run) -> dict[str, object]:
    """What the run came to, in one line of the log and as an object."""
    state, steps = built.state, built.curriculum.total
    saved = built.saver.last.name if built.saver.last is not None else None
    figures = {"skipped_updates": built.guard.skipped, **state.damage, "rows_digest": f"{state.rows_digest:016x}"}
    why = f" ({built.interrupt.why or 'asked by another rank'}; exit code {code})" if status == "interrupted" else ""
    listed = ", ".join(f"{k} {v}" for k, v in figures.items())
    log.info("%s at step %d of %d%s; checkpoint %s; %s", status, state.step, steps, why, saved, listed)
    return {"status": status, "exit_code": code, "step": state.step, "steps": steps, "checkpoint": saved, **figures}


def write_outcome(folder: Path, tracker: Tracker, outcome: dict[str, object]) -> None:
    """outcome.json, which scripts read because launchers do not pass exit codes on; and the end of the tracked run."""
    try:
        write_atomically(folder / OUTCOME, json.dumps(outcome, indent=1).encode() + b"\n")
    except OSError as error:
        log.warning("%s cannot be written (%s)", folder / OUTCOME, error.strerror)
    else:
        tracker.artifact(folder / OUTCOME)
    ended = str(outcome["status"])
    # A run that was asked to leave, or whose other ranks are gone, has seconds.
    status = {"finished": "FINISHED", "interrupted": "KILLED"}.get(ended, "FAILED")
    tracker.close(status, patience=60.0 if ended == "finished" else 10.0)


def check_labels(curriculum: Curriculum, manifest: Manifest) -> None:
    """Raise UserError when stage align is asked for and the data name no concepts."""
    if "align" in curriculum.names and not manifest.concepts:
        raise UserError(
            "stage align needs labelled rows, but the manifest of data.shards names no concepts; drop the stage or extract with labels"
        )


def fresh_state(config: Config, manifest: Manifest) -> checkpoint.RunState:
    """The state before step 0."""
    return checkpoint.RunState(0, 0, "", config.run.seed, {}, 0, wanted_form(config, manifest))


def wanted_form(config: Config, manifest: Manifest) -> dict[str, object]:
    """The dictionary's form as configuration and data ask for it (RunState.dictionary)."""
    form = {key: value for key, value in vars(config.dictionary).items() if key != "initial_l0"}  # of no use later
    return {"width": manifest.width, "concepts": list(manifest.concepts), "answers": len(manifest.answers), **form}


def resumed_state(folder: Path, config: Config, manifest: Manifest, plan: Plan) -> checkpoint.RunState:
    """The state of a checkpoint, if it fits configuration and data. Raises UserError naming what differs."""
    state = checkpoint.read_state(folder)
    for key, wanted in wanted_form(config, manifest).items():
        if state.dictionary.get(key) != wanted:
            raise UserError(
                f"checkpoint {folder} has {key}={_short(state.dictionary.get(key))} but this run has {_short(wanted)}; "
                f"use the configuration and data it was made with, or checkpoint.resume=none and another run.dir"
            )
    if state.seed != config.run.seed:
        raise UserError(
            f"checkpoint {folder} was made with run.seed={state.seed}, not {config.run.seed}; the order of rows would change"
        )
    plan.resume(state.stream)
    return state


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def open_tracker(config: Config, folder: Path, manifest: Manifest, step: int, topology: Topology) -> Tracker | None:
    """The run folder with config.yaml, and the tracker of the main rank."""
    if not topology.is_main:
        return None
    # What is kept and shown elsewhere carries no credentials and no signed query.
    config = replace(config, data=replace(config.data, shards=redact(config.data.shards)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", to_yaml(config).encode())
        (folder / OUTCOME).unlink(missing_ok=True)  # of an earlier attempt
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be written ({error.strerror}); choose another folder") from error
    tags = {"manifest_digest": manifest.digest, "hook_point": manifest.hook_point, "model": manifest.model}
    tracker = Tracker(folder, config.tracking, flatten(config), tags, step)
    tracker.artifact(folder / "config.yaml")
    return tracker


def exit_with(code: int) -> None:
    """Leave at once when ranks are waiting for each other: a rank that refuses must not hang the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code and launched_world()[2] > 1:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    exit_with(main())
