"""Train a concept-aligned dictionary: `accelerate launch -m trainer.train --config configs/X.yaml key=value ...`.

key=value overrides the YAML, for example data.shards=data/demo/layer-01/train dictionary.free_slots=16384
stages.1.epochs=40.
"""

import argparse
import logging
import os
import sys
from contextlib import ExitStack

from trainer import loop
from trainer.agreement import AgreedError
from trainer.allocator import keep_freed_memory
from trainer.assembly import build_run, open_live
from trainer.config import Config, load_config
from trainer.failures import QUIET, exit_with, in_one_line, tell_launcher
from trainer.files import write_json
from trainer.inputs import read_inputs
from trainer.interrupt import Interrupt
from trainer.stepping import Run
from trainer.topology import launched_world
from trainer.tracking import STATUS, Tracker

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Parse, train, and turn bad input into one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="trainer.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    args = parser.parse_args(argv)
    keep_freed_memory()
    rank, world, timeout = 0, 1, None
    with Interrupt() as interrupt:
        try:
            rank, _, world = launched_world()
            level = logging.INFO if rank == 0 else logging.WARNING
            logging.basicConfig(level=level, format=f"%(levelname)s rank {rank}/{world}: %(message)s")
            config = load_config(args.config, args.overrides)
            timeout = config.parallel.timeout
            return run(config, interrupt)
        except Exception as error:
            line = in_one_line(error, timeout)
            who = f"rank {rank}: " if world > 1 else ""
            tell_launcher(error, line and f"{who}{line}")
            if line is None:
                raise
            said_by_main = isinstance(error, AgreedError) and rank > 0
            if not said_by_main and (world == 1 or QUIET not in os.environ):
                print(f"trainer.train: {who}error: {line}", file=sys.stderr)
            return 2


def run(config: Config, interrupt: Interrupt) -> int:
    """Build everything that the configuration names, resume if there is something to resume, and train.

    Returns the exit code: 0, or one of trainer.interrupt.
    """
    live = open_live(config)
    inputs = read_inputs(config, launched_world()[2], live)
    interrupt.limit(config.run.wall_minutes)
    with ExitStack() as ending:
        built = build_run(inputs, live, interrupt, ending)
        code, status = 2, "failed"
        try:
            code = loop.train(built)
            status = "interrupted" if code else "finished"
        finally:
            built.saver.close()
            if built.tracker is not None:
                write_outcome(built, built.tracker, summarise(status, code, built))
        built.strategy.topology.barrier()  # the launcher ends all ranks when one has left
        return code


def summarise(status: str, code: int, built: Run) -> dict[str, object]:
    """What the run came to, in one line of the log and as an object."""
    state, steps = built.state, built.curriculum.total
    saved = built.saver.last.name if built.saver.last is not None else None
    figures = {"skipped_updates": built.guard.skipped, **state.damage, "rows_digest": f"{state.rows_digest:016x}"}
    why = f" ({built.interrupt.why or 'asked by another rank'}; exit code {code})" if status == "interrupted" else ""
    listed = ", ".join(f"{k} {v}" for k, v in figures.items())
    log.info("%s at step %d of %d%s; checkpoint %s; %s", status, state.step, steps, why, saved, listed)
    best = {} if built.saver.best is None else {"best": vars(built.saver.best)}
    return {
        **{"status": status, "exit_code": code, "step": state.step, "steps": steps, "checkpoint": saved},
        **best,
        **figures,
    }


def write_outcome(built: Run, tracker: Tracker, outcome: dict[str, object]) -> None:
    """outcome.json, which scripts read because launchers do not pass exit codes on; and the end of the tracked run."""
    path = built.folder.outcome
    try:
        write_json(path, outcome)
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error.strerror)
    else:
        tracker.artifact(path)
    ended = str(outcome["status"])
    # A run that was asked to leave, or whose other ranks are gone, has seconds.
    tracker.close(STATUS[ended], patience=60.0 if ended == "finished" else 10.0)


if __name__ == "__main__":
    exit_with(main())
