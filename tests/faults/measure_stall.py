"""Prints what a save costs training: `python -m tests.faults.measure_stall` (S = 100,006, D = 768, about 3 minutes).

A dictionary with the firing rate of a trained one (about 100 active slots per row) takes steps with a save every
`--every`. Printed per save: seconds that the loop stood still for the snapshot, seconds that the steps beside the
writing thread took longer than steps without a save (negative where noise is larger), and CPU seconds of that thread.
The share is what standing still and slower steps take from 100 steps with one save. Where a disk takes a checkpoint
slower than the steps between two saves, the loop waits for it, and that is in the time it stood still. Figures of saves
need three of them, and steps with none beside them (`--every`).

`loop_s` is what lies between the update of a step and the rows of the next one on their way to the device: reading
rows, their digest, votes, figures. All steps count, those with a line in metrics.jsonl too; saves do not. `loop_share`
sets it against the work of the steps.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from trainer import loop, stepping, train
from trainer.checkpoint import Saver
from trainer.dictionary import SlotBank
from trainer.stepping import Run
from trainer.stream import ShardSpec, ShardWriter
from trainer.sums import MicroBatch

CONCEPTS = [f"c{i}" for i in range(6)]


def main(argv: list[str] | None = None) -> None:
    """Parse, train, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--synchronous", action="store_true")
    parser.add_argument("--folder", help="where to write; default: a temporary folder that is removed")
    args = parser.parse_args(argv)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="stall-"))
    try:
        sys.stdout.write(json.dumps(measure(args, folder), indent=1) + "\n")
    finally:
        shutil.rmtree(folder)


def stand_in(owner: object, **functions: object) -> None:
    """Put functions in the place of an owner's."""
    for name, function in functions.items():
        assert hasattr(owner, name), f"{owner} has no {name}"
        setattr(owner, name, function)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of steps and saves of one run."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4 * args.batch, args.width, generator=generator)
    spec = ShardSpec(width=args.width, dtype="float16", concepts=CONCEPTS, answers=["a"])
    with ShardWriter(folder / "data", "train", spec) as writer:
        writer.write(rows, torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows), dtype=torch.int64))
    (folder / "run.yaml").write_text("stages: [{name: pretrain, steps: %d}]" % args.steps)  # noqa: UP031

    original_bank, original_save = SlotBank.__init__, Saver.save
    original_begin, original_update = loop.to_micro_batch, stepping.clip_and_update
    original_write, original_commit = Saver._write, Saver._commit
    steps: list[tuple[float, bool]] = []  # seconds of each step's work, and whether a save was being written
    saves: list[float] = []  # seconds that the loop stood still
    writing: list[float] = []  # CPU seconds in the background

    def quiet_bank(self: SlotBank, slots: int, width: int, **options: object) -> None:
        original_bank(self, slots, width, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            self.b_enc.fill_(-3.1 * width**-0.5)  # one slot in a thousand fires on a random row

    begun: list[tuple[float, bool]] = []
    ended: list[float] = []
    between: list[float] = []  # seconds from the end of a step's work to the beginning of the next one's

    def timed_begin(run: Run, *rest: object) -> MicroBatch:
        begun.append((time.perf_counter(), run.saver.pending))
        if ended:
            between.append(begun[-1][0] - ended.pop())
        return original_begin(run, *rest)  # type: ignore[arg-type]

    def timed_update(run: Run, *rest: object) -> list[Tensor]:
        figures = original_update(run, *rest)  # type: ignore[arg-type]
        began, busy = begun.pop()
        ended[:] = [time.perf_counter()]
        steps.append((ended[0] - began, busy))
        return figures

    def timed_save(self: Saver, *rest: object, **options: object) -> None:
        began = time.perf_counter()
        original_save(self, *rest, **options)  # type: ignore[arg-type]
        saves.append(time.perf_counter() - began)
        if ended:
            ended[0] += saves[-1]

    def timed_write(self: Saver, *rest: object) -> None:
        cpu = time.thread_time()
        original_write(self, *rest)  # type: ignore[arg-type]
        writing.append(time.thread_time() - cpu)

    def timed_commit(self: Saver) -> None:
        cpu = time.thread_time()
        original_commit(self)
        writing[-1] += time.thread_time() - cpu

    stand_in(SlotBank, __init__=quiet_bank)
    stand_in(loop, to_micro_batch=timed_begin)
    stand_in(stepping, clip_and_update=timed_update)
    stand_in(Saver, save=timed_save, _write=timed_write, _commit=timed_commit)
    settings = {
        "run.dir": folder / "run", "data.shards": folder / "data", "data.global_batch": args.batch, "data.threads": 1,
        "dictionary.free_slots": args.slots, "optim.lr": 1e-6, "revival.method": "none", "tracking.uri": "off",
        "checkpoint.keep": 1, "checkpoint.every": args.every, "checkpoint.asynchronous": not args.synchronous,
    }  # fmt: skip
    try:
        code = train.main(["--config", str(folder / "run.yaml"), *(f"{k}={v!s}" for k, v in settings.items())])
    finally:
        stand_in(SlotBank, __init__=original_bank)
        stand_in(loop, to_micro_batch=original_begin)
        stand_in(stepping, clip_and_update=original_update)
        stand_in(Saver, save=original_save, _write=original_write, _commit=original_commit)
    if code:
        raise SystemExit(code)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    quiet = [seconds for seconds, busy in steps[3:] if not busy]
    free = median(quiet or [seconds for seconds, _ in steps[3:]])
    found = {
        "slots": args.slots + len(CONCEPTS), "width": args.width, "mean_l0": lines[-1]["l0"], "saves": len(saves),
        "step_s": free, "loop_s": sum(between) / len(between),
        "loop_share": sum(between) / sum(seconds for seconds, _ in steps),
        "share_waiting_for_rows": max(line["stall"] for line in lines[1:]),
    }  # fmt: skip
    if len(saves) < 3 or not quiet:  # nothing to compare a save with
        return found
    # The first save makes the memory of the snapshot, the last one is written while the loop waits.
    blocked, middle = median(saves[1:-1]), len(saves) - 1
    slower = [seconds - free for seconds, busy in steps if busy]
    return found | {
        "first_save_s": saves[0], "blocked_s": blocked, "steps_beside_a_save": len(slower) / middle,
        "slower_s": sum(slower) / middle, "writing_cpu_s": median(writing[:-1]), "last_save_s": saves[-1],
        "share_at_one_save_per_100_steps": (blocked + sum(slower) / middle) / (100 * free),
    }  # fmt: skip


if __name__ == "__main__":
    main()
