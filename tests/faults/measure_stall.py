"""Prints what a save costs training: `python -m tests.faults.measure_stall` (100,006 slots of width 768, about 3 minutes on two free cores).

A dictionary with the firing rate of a trained one (about 100 active slots per row) takes steps with a save every `--every`. Printed per save:
seconds and CPU seconds that the loop stood still, and CPU seconds of the writing thread, which training may miss where it uses every core. The
stall is the first over the time of 100 steps; the bound that follows it counts all writing as lost. Where a disk takes a checkpoint slower than
the steps between two saves, the loop waits for it, and that is in the stall.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from trainer import loop, train
from trainer.checkpoint import Saver
from trainer.dictionary import SlotBank
from trainer.stream import ShardWriter

CONCEPTS = [f"c{i}" for i in range(6)]


def main() -> None:
    """Parse, train, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--synchronous", action="store_true")
    parser.add_argument("--folder", help="where to write; default: a temporary folder that is removed")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="stall-"))
    try:
        print(json.dumps(measure(args, folder), indent=1))
    finally:
        shutil.rmtree(folder)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of steps and saves of one run."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4 * args.batch, args.width, generator=generator)
    names = {"concepts": CONCEPTS, "answers": ["a"], "model": "none", "hook_point": "none"}
    with ShardWriter(folder / "data", "train", width=args.width, dtype="float16", **names) as writer:
        writer.write(rows, torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows), dtype=torch.int64))
    (folder / "run.yaml").write_text("stages: [{name: pretrain, steps: %d}]" % args.steps)  # noqa: UP031

    original_bank, original_update, original_save = SlotBank.__init__, loop.update, Saver.save
    original_write, original_commit = Saver._write, Saver._commit
    steps: list[tuple[float, float]] = []  # seconds and CPU seconds of each step's work
    saves: list[tuple[float, float]] = []  # the same of each save in the loop
    writing: list[float] = []  # CPU seconds in the background

    def quiet_bank(self: SlotBank, slots: int, width: int, **options: object) -> None:
        original_bank(self, slots, width, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            self.b_enc.fill_(-3.1 * width**-0.5)  # one slot in a thousand fires on a random row

    def timed_update(*rest: object) -> list[float]:
        began, cpu = time.perf_counter(), time.thread_time()
        votes = original_update(*rest)  # type: ignore[arg-type]
        steps.append((time.perf_counter() - began, time.thread_time() - cpu))
        return votes

    def timed_save(self: Saver, *rest: object, **options: object) -> None:
        began, cpu = time.perf_counter(), time.thread_time()
        original_save(self, *rest, **options)  # type: ignore[arg-type]
        saves.append((time.perf_counter() - began, time.thread_time() - cpu))

    def timed_write(self: Saver, *rest: object) -> None:
        cpu = time.thread_time()
        original_write(self, *rest)  # type: ignore[arg-type]
        writing.append(time.thread_time() - cpu)

    def timed_commit(self: Saver) -> None:
        cpu = time.thread_time()
        original_commit(self)
        writing[-1] += time.thread_time() - cpu

    SlotBank.__init__, loop.update = quiet_bank, timed_update  # type: ignore[method-assign, assignment]
    Saver.save, Saver._write, Saver._commit = timed_save, timed_write, timed_commit  # type: ignore[method-assign, assignment]
    settings = {
        "run.dir": folder / "run", "data.shards": folder / "data", "data.global_batch": args.batch, "data.threads": 1,
        "dictionary.free_slots": args.slots, "optim.lr": 1e-6, "revival.method": "none", "tracking.uri": "off", "checkpoint.keep": 1,
        "checkpoint.every": args.every, "checkpoint.asynchronous": not args.synchronous,
    }  # fmt: skip
    try:
        code = train.main(["--config", str(folder / "run.yaml"), *(f"{k}={v!s}" for k, v in settings.items())])
    finally:
        SlotBank.__init__, loop.update = original_bank, original_update  # type: ignore[method-assign]
        Saver.save, Saver._write, Saver._commit = original_save, original_write, original_commit  # type: ignore[method-assign]
    if code:
        raise SystemExit(code)
    line = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    step_s, step_cpu = (median(values) for values in zip(*steps[3:], strict=True))
    # The first save makes the memory of the snapshot, the last one is written while the loop waits.
    blocked, blocked_cpu = (median(values) for values in zip(*saves[1:-1], strict=True))
    writing_cpu = median(writing[:-1])
    return {
        "slots": args.slots + len(CONCEPTS), "width": args.width, "mean_l0": line["l0"], "saves": len(saves) - 2,
        "step_s": step_s, "step_cpu_s": step_cpu, "first_save_s": saves[0][0], "blocked_s": blocked, "blocked_cpu_s": blocked_cpu,
        "writing_cpu_s": writing_cpu, "last_save_s": saves[-1][0],
        "stall_share_at_one_save_per_100_steps": blocked / (100 * step_s),
        "share_if_all_writing_cpu_were_lost": (blocked_cpu + writing_cpu) / (100 * step_cpu),
    }  # fmt: skip


if __name__ == "__main__":
    main()
