"""Prints what a save costs training: `python -m tests.faults.measure_stall` (100,006 slots of width 768, about 3 minutes on two cores).

A dictionary with the firing rate of a trained one (about 100 active slots per row) takes steps with a save every `--every`. Three figures
per save: seconds that the loop stood still; seconds that steps took longer while the save was written in the background; seconds until it
was committed. Their first two, over the time of 100 steps, are the share of a run that saves every 100 steps.
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
    steps: list[tuple[float, bool]] = []  # seconds of each step's work, and whether a save was being written
    saves: list[tuple[float, float]] = []  # when it began, seconds that it blocked
    commits: list[float] = []

    def quiet_bank(self: SlotBank, slots: int, width: int, **options: object) -> None:
        original_bank(self, slots, width, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            self.b_enc.fill_(-3.1 * width**-0.5)  # one slot in a thousand fires on a random row

    def timed_update(run: loop.Run, *rest: object) -> list[float]:
        began, writing = time.perf_counter(), run.saver.pending
        if not writing and len(commits) < len(saves):
            commits.append(began - saves[-1][0])
        votes = original_update(run, *rest)  # type: ignore[arg-type]
        steps.append((time.perf_counter() - began, writing))
        return votes

    def timed_save(self: Saver, *rest: object, **options: object) -> None:
        began = time.perf_counter()
        original_save(self, *rest, **options)  # type: ignore[arg-type]
        saves.append((began, time.perf_counter() - began))

    SlotBank.__init__, loop.update, Saver.save = quiet_bank, timed_update, timed_save  # type: ignore[method-assign, assignment]
    settings = {
        "run.dir": folder / "run", "data.shards": folder / "data", "data.global_batch": args.batch, "data.threads": 1,
        "dictionary.free_slots": args.slots, "optim.lr": 1e-6, "revival.method": "none", "tracking.uri": "off", "checkpoint.keep": 1,
        "checkpoint.every": args.every, "checkpoint.asynchronous": not args.synchronous,
    }  # fmt: skip
    try:
        code = train.main(["--config", str(folder / "run.yaml"), *(f"{k}={v!s}" for k, v in settings.items())])
    finally:
        SlotBank.__init__, loop.update, Saver.save = original_bank, original_update, original_save  # type: ignore[method-assign]
    if code:
        raise SystemExit(code)
    line = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    quiet = median(seconds for seconds, writing in steps[3:] if not writing)
    slower = [seconds - quiet for seconds, writing in steps[3:] if writing]
    blocked = [seconds for _, seconds in saves[:-1]]  # the last one waits until it is written
    extra = sum(slower) / max(len(blocked), 1)
    blocked_mean = sum(blocked) / max(len(blocked), 1)
    return {
        "slots": args.slots + len(CONCEPTS), "width": args.width, "mean_l0": line["l0"], "step_s": quiet, "saves": len(blocked),
        "blocked_s": blocked_mean, "blocked_s_each": blocked, "slower_steps_s": extra, "committed_after_s": max(commits, default=0.0),
        "last_save_s": saves[-1][1], "share_of_run_at_one_save_per_100_steps": (blocked_mean + extra) / (100 * quiet),
    }  # fmt: skip


if __name__ == "__main__":
    main()
