"""Tries the faults of tests/faults/table.yaml, one by one, and prints how many were survived.

    python -m tests.faults.fault_table [CLASS ...]

A fault is survived when what was expected happens within its time: a refusal in one line that touches nothing, or a run
that ends where an undisturbed one ends.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.support.data import write_data
from tests.support.runs import arguments, metrics
from tools import cli
from trainer import loop, train
from trainer.checkpoint.files import seal
from trainer.stepping import Run
from trainer.stream import Batch
from trainer.sums import MicroBatch

TABLE = Path(__file__).with_name("table.yaml")
SECONDS = 30
LEFT, ENDS = 40, 44  # steps after which the run that is there was asked to leave, and of the whole run
LENGTH = ["stages.1.epochs=null", "stages.1.steps=24"]


@dataclass
class Fault:
    """One fault: what is done to the folder, what is started, and what must come of it."""

    kind: str
    name: str
    expect: str
    says: str = ""
    hides: str = ""
    fresh: bool = False
    settings: list[str] = field(default_factory=list)
    command: list[str] | None = None
    config: str | None = None
    harm: Callable[[Path], None] = lambda folder: None


def truncate(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Leave nothing of a file but its name."""
    os.truncate(path, 0)


def folder(path: Path) -> None:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    """Put a pipe that nobody writes to in the place of a file."""
    path.unlink()
    os.mkfifo(path)


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncate": truncate,
    "flip": flip,
    "empty": empty,
    "delete": Path.unlink,
    "folder": folder,
    "fifo": fifo,
}


def change(path: Path, changes: dict[str, Any], reseal: bool) -> None:
    """Set dotted keys of a JSON file; with `reseal` hashes.json beside it says that this is right."""
    content = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part for part in dotted.split("."))
        target = content
        for part in parents:
            target = target[part]
        target[last] = value
    path.write_text(json.dumps(content))
    if reseal:
        hashes = path.parent / "hashes.json"
        hashes.write_text(json.dumps(json.loads(hashes.read_text()) | {path.name: seal(path)}))


def faults() -> Iterator[Fault]:
    """All entries of the table, spread out."""
    for entry in yaml.safe_load(TABLE.read_text()):
        common = {"kind": entry["class"], "expect": entry["expect"], "fresh": entry.get("start") == "fresh"}
        common |= {name: entry[name] for name in ("says", "hides") if name in entry}
        for key, values in entry.get("keys", {}).items():
            for value in values:
                setting = f"{key}={'null' if value is None else value}"
                yield Fault(**common | {"says": key.rpartition(".")[2]}, name=setting, settings=[setting])
        for settings in entry.get("settings", []):
            yield Fault(**common, name=" ".join(settings), settings=settings)
        for text in entry.get("configs", []):
            yield Fault(**common, name=text, config=text)
        for pattern in entry.get("files", []):
            for damage in entry["damage"]:
                yield Fault(**common, name=f"{damage} {pattern}", harm=on_all(pattern, DAMAGES[damage]))
        for changes in entry.get("changes", []):
            harm = on_all(entry["json"], partial(change, changes=changes, reseal=entry.get("reseal", False)))
            yield Fault(**common, name=f"{entry['json']}: {json.dumps(changes)}", harm=harm)
        for words in entry.get("commands", []):
            yield Fault(**common, name=" ".join(words), command=words)


def on_all(pattern: str, harm: Callable[[Path], None]) -> Callable[[Path], None]:
    """Harm done to every file of a pattern."""

    def harm_all(folder: Path) -> None:
        found = sorted(folder.glob(pattern))
        assert found, f"{pattern} names no file"
        for path in found:
            harm(path)

    return harm_all


@contextlib.contextmanager
def left_after(step: int) -> Iterator[None]:
    """A run that is asked to leave when it has taken `step` steps."""
    original = loop.to_micro_batch

    def to_micro_batch(run: Run, rows: Batch) -> MicroBatch:
        if run.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, rows)

    loop.to_micro_batch = to_micro_batch
    try:
        yield
    finally:
        loop.to_micro_batch = original


class Bench:
    """A data set and a run to do harm to, and where that run ends undisturbed."""

    def __init__(self, folder: Path):
        self.folder, self.base = folder, folder / "base"
        write_data(self.base / "train")
        (self.base / "empty").mkdir()
        with left_after(LEFT):
            assert start(lambda: train.main(self.argv(self.base, []))).code == 75
        with self.copy() as copy:
            assert start(lambda: train.main(self.argv(copy, []))).code == 0
            self.end = metrics(copy)[ENDS]

    @staticmethod
    def argv(folder: Path, settings: list[str], fresh: bool = False) -> list[str]:
        """Command line of training in a folder."""
        argv = arguments(folder, folder / "train", "data.retries=1", "data.timeout=5", *LENGTH, *settings)
        return [a.replace(f"run.dir={folder / 'run'}", f"run.dir={folder / 'fresh'}") if fresh else a for a in argv]

    @contextlib.contextmanager
    def copy(self) -> Iterator[Path]:
        """The base in a folder of its own, which goes afterwards."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            shutil.copytree(self.base, Path(name) / "base")
            yield Path(name) / "base"

    def attempt(self, fault: Fault) -> str:
        """What is wrong with how the fault was met; empty where it was survived."""
        with self.copy() as folder:
            fault.harm(folder)
            before = content(folder)
            ended = start(lambda: self.run(fault, folder), folder)
            return self.judge(fault, ended, folder, before)

    def run(self, fault: Fault, folder: Path) -> int:
        """Start what the fault is about."""
        if fault.command is not None:
            return cli.main(fault.command)
        argv = self.argv(folder, fault.settings, fault.fresh)
        if fault.config is not None:
            Path(argv[1]).write_text(fault.config)
        return train.main(argv)

    def judge(self, fault: Fault, ended: "Ended", folder: Path, before: dict[str, bytes]) -> str:
        """What differs from what was expected."""
        if ended.crash or ended.seconds > SECONDS:
            return ended.crash or f"took {ended.seconds:.0f} s"
        after = content(folder)
        if fault.hides and (fault.hides in ended.said or any(fault.hides.encode() in text for text in after.values())):
            return f"{fault.hides} is kept or shown"
        lines = [line for line in ended.said.splitlines() if ": error: " in line]
        if fault.expect == "goes on":
            line = metrics(folder).get(ENDS, {}) if ended.code == 0 else {}
            same = all(line.get(name) == self.end[name] for name in ("loss", "rows_digest"))
            return "" if same else f"exit code {ended.code}, {lines or 'another end'}"
        if ended.code != 2 or len(lines) != 1:
            return f"exit code {ended.code}, {len(lines)} lines: {ended.said[-300:]}"
        if fault.says not in lines[0]:
            return f"the line does not say {fault.says}: {lines[0]}"
        touched = [name for name, text in before.items() if name != "small.yaml" and after.get(name) != text]
        made = [name for name in after.keys() - before.keys() if "checkpoints" in name or name.endswith(".tar")]
        return f"touched {touched + made}" if touched or made else ""


@dataclass
class Ended:
    """How a start ended."""

    code: int | None
    said: str
    seconds: float
    crash: str


def content(folder: Path) -> dict[str, bytes]:
    """Every regular file of data and checkpoints, by name."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".owner" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def start(action: Callable[[], int], folder: Path | None = None) -> Ended:
    """Run an action in this process, in a folder, with a time limit; what it writes and logs is kept."""
    said, crash, code, began = io.StringIO(), "", None, time.monotonic()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.chdir(folder or Path.cwd()):
            code = action()
    except (Exception, SystemExit):
        crash = traceback.format_exc(limit=-3)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        logging.getLogger().removeHandler(handler)
    return Ended(code, said.getvalue(), time.monotonic() - began, crash)


def late(*_: object) -> None:
    """Ends what hangs."""
    raise TimeoutError(f"no end within {SECONDS} s")


def attempt_all(folder: Path, kinds: list[str]) -> tuple[int, list[str]]:
    """Number of faults tried, and a text about each that was not survived."""
    bench, failed = Bench(folder), []
    tried: dict[str, list[int]] = {}
    for fault in faults():
        if not kinds or fault.kind in kinds:
            problem = bench.attempt(fault)
            counts = tried.setdefault(fault.kind, [0, 0])
            counts[0] += not problem
            counts[1] += 1
            if problem:
                failed.append(f"{fault.kind}: {fault.name!r:.120}: {problem}")
    for kind, (survived, total) in tried.items():
        sys.stdout.write(f"{survived:4} / {total:4}  {kind}\n")
    total = sum(count for _, count in tried.values())
    sys.stdout.write(f"{total - len(failed):4} / {total:4}  survived\n")
    return total, failed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        _, problems = attempt_all(Path(name), sys.argv[1:])
    sys.stdout.write("".join(f"{line}\n" for line in problems))
    sys.exit(1 if problems else 0)
