"""Trains one point and measures it: the dictionary, its CPU seconds, its dead slots, and its FVU and L0 on other rows.

Every trainer sees the same rows in the same order (those of our stream at one rank), without those of giant norm
(data.max_norm), for the same number of steps.
"""

import json
import resource
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.frontiers.points import OURS, Point
from trainer import pretrained
from trainer.analysis.evaluation import at_most, reconstruct
from trainer.analysis.results import all_rows, rows_of
from trainer.checkpoint import load_dictionary
from trainer.config import flatten, load_config
from trainer.errors import UserError
from trainer.inputs import Inputs, read_inputs
from trainer.stream import Manifest, Stream, lanes_of_rank

_PEER = Path(__file__).with_name("peer_training.py")


@dataclass
class Setting:
    """What all points have in common.

    config: YAML, and `common`, overrides of it. launcher: what stands before trainer.train. splits: name -> shard
    folder, to measure on. peers_python: interpreter of the environment with the peers, "" for none.
    """

    config: str
    common: list[str]
    launcher: str
    splits: dict[str, str]
    peers_python: str = ""
    tracked: list[str] = field(default_factory=list)

    def inputs(self, point: Point) -> Inputs:
        """The run of ours that the point is, or whose rows a peer is given. Raises UserError for one that cannot be."""
        return read_inputs(load_config(self.config, self.overrides(point)))

    def overrides(self, point: Point) -> list[str]:
        """What the point sets beside the YAML."""
        said = [*self.common, *point.overrides()]
        if point.share == 1.0:
            return said
        config = load_config(self.config, said)
        said.append(f"optim.warmup={round(point.share * config.optim.warmup)}")
        for number, stage in enumerate(config.stages):
            if stage.epochs is not None:
                said.append(f"stages.{number}.epochs={point.share * stage.epochs!r}")
            elif stage.steps is not None:
                said.append(f"stages.{number}.steps={max(1, round(point.share * stage.steps))}")
        return said


@contextmanager
def cpu_seconds(into: dict[str, Any]) -> Iterator[None]:
    """Adds `cpu_seconds`, of the processes that were started and have ended meanwhile."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    yield
    into["cpu_seconds"] = used() - before


def train(point: Point, setting: Setting, folder: Path) -> dict[str, Any]:
    """Figures of the point, trained in `folder`. Raises UserError when a trainer fails."""
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was broken off: seconds are those of a whole run
    folder.mkdir(parents=True)
    inputs = setting.inputs(point)
    found: dict[str, Any] = {"rows": inputs.curriculum.total * inputs.config.data.global_batch, "validation": None}
    found |= (_ours if point.trainer in OURS else _peer)(point, setting, folder, inputs)
    return found


def _ours(point: Point, setting: Setting, folder: Path, inputs: Inputs) -> dict[str, Any]:
    command = [*shlex.split(setting.launcher), "trainer.train", "--config", setting.config]
    found: dict[str, Any] = {}
    with cpu_seconds(found), (folder / "train.log").open("w") as log:
        named = [f"tracking.run_name={point.name}", f"run.dir={folder / 'run'}"]
        run = [*command, *setting.overrides(point), *setting.tracked, *named]
        code = subprocess.run(run, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise UserError(f"{point.name} failed with exit code {code}; see {folder / 'train.log'}")
    dictionary, manifest = load_dictionary(folder / "run")
    fired = torch.cat([bank.last_fired for bank in dictionary.free_banks()])
    epoch = min(inputs.plan.steps_per_epoch, inputs.curriculum.total)
    found["dead"] = float((fired <= inputs.curriculum.total - epoch).double().mean())
    most = manifest.most_norm(inputs.config.data.max_norm)
    for name, split in setting.splits.items():
        rows, _ = rows_of([split], dictionary, match_concepts=False)
        measured = reconstruct(dictionary, at_most(rows, most))
        found[name] = {"fvu": measured.fvu, "l0": measured.l0, "rows": measured.rows}
    return found


def made_with(point: Point, setting: Setting) -> dict[str, Any]:
    """What the figures of a point depend on, as JSON keeps it: of a peer, what it is told and the order of its rows.

    Raises UserError for a point that cannot be trained or measured.
    """
    inputs = setting.inputs(point)
    facts: dict[str, Any] = {"data": inputs.manifest.digest}
    for name, folder in setting.splits.items():
        manifest = Manifest.load(folder)
        if manifest.width != inputs.manifest.width:
            raise UserError(
                f"--{name} {folder} has rows of width {manifest.width}, data.shards of {inputs.manifest.width}"
            )
        facts[name] = manifest.digest
    config = flatten(inputs.config)
    if point.trainer in OURS:
        facts["config"] = {key: config[key] for key in config if not key.startswith(("run.dir", "tracking"))}
    else:
        order = ("data.lanes", "data.window", "data.max_norm", "run.seed")
        facts |= {"told": told(point, inputs), "order": {key: config[key] for key in order}}
    return json.loads(json.dumps(facts))


def told(point: Point, inputs: Inputs) -> dict[str, Any]:
    """What peer_training.py is told, but for where to save."""
    config, steps = inputs.config, inputs.curriculum.total
    return {
        "trainer": point.trainer, "width": inputs.manifest.width, "slots": config.dictionary.free_slots,
        "l0": point.l0, "lr": point.lr, "seed": point.seed, "steps": steps, "rows": config.data.global_batch,
        "warmup": config.optim.warmup, "decay": round(config.optim.decay * steps),
        "epoch": min(inputs.plan.steps_per_epoch, steps),
    }  # fmt: skip


def _peer(point: Point, setting: Setting, folder: Path, inputs: Inputs) -> dict[str, Any]:
    """Peers are given normalised rows times sqrt(D), which is how SAELens scales activations itself."""
    config, manifest, steps = inputs.config, inputs.manifest, inputs.curriculum.total
    asked = told(point, inputs) | {"out": str(folder / "dictionary")}
    found: dict[str, Any] = {}
    lanes = lanes_of_rank(config.data.lanes, 0, 1)
    with cpu_seconds(found), (folder / "train.log").open("w") as log:
        try:
            peer = subprocess.Popen(
                [setting.peers_python, str(_PEER), json.dumps(asked)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"--peers-python {setting.peers_python} cannot be run ({error.strerror})") from error
        assert peer.stdin is not None and peer.stdout is not None
        try:
            with peer.stdin, Stream(config.data, inputs.sources, inputs.plan, lanes) as stream:
                for _ in range(steps):
                    batch = next(stream)
                    x = scaled(batch.acts[batch.valid], manifest)
                    peer.stdin.write(len(x).to_bytes(8, "little"))
                    peer.stdin.write(x.numpy().tobytes())
        except BrokenPipeError:  # it says why
            pass
        said = peer.stdout.read().decode()
        code = peer.wait()
    if code:
        last = ((folder / "train.log").read_text(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
        raise UserError(f"{point.name}: --peers-python {setting.peers_python} failed: {last:.300}")
    found["dead"] = float(said.splitlines()[-1])
    scratch = folder / "scratch"
    scratch.mkdir()
    source = pretrained.open_source(str(folder / "dictionary"), scratch)
    for name, split in setting.splits.items():
        x = _split_rows(split, inputs)
        measured = pretrained.measure(source, x) if source.top_k is None else pretrained.calibrate(source, x)[1]
        found[name] = {"fvu": measured.fvu, "l0": measured.l0, "rows": measured.rows}
    return found


def scaled(acts: Tensor, manifest: Manifest) -> Tensor:
    """Rows [B, D] as peers are given them, fp32."""
    return (acts.float() - torch.tensor(manifest.mean)) * (manifest.width**0.5 / manifest.scale)


def _split_rows(split: str, inputs: Inputs) -> Tensor:
    """All rows [N, D] of a split as peers are given them."""
    rows, most = all_rows(split, Manifest.load(split)), inputs.manifest.most_norm(inputs.config.data.max_norm)
    parts = [acts.float() for acts, _ in at_most(rows, most)()]
    return scaled(torch.cat(parts), inputs.manifest)
