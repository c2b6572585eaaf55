"""What `alignsae extract` does; its arguments and its help are in tools/parsers."""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.extracting.places import chosen_points, folder_name
from tools.extracting.units import UnitWriter, is_finished, joined, units_name
from trainer.agreement import decide, require_agreement
from trainer.errors import UserError
from trainer.extraction import (
    COMPUTE,
    Clock,
    Documents,
    Extractor,
    Settings,
    Windows,
    identity,
    open_documents,
    unit_name,
)
from trainer.language_model import SPLITS, load_language_model
from trainer.stream import Manifest, ShardSpec
from trainer.stream.manifest import FILE_NAME as MANIFEST_NAME
from trainer.stream.normalisation import MAX_NORM
from trainer.stream.parts import join_parts
from trainer.topology import Topology, launched_world

PATIENCE = 7 * 24 * 3600.0  # seconds that a process waits for the others, which may have a unit more to do


@dataclass
class Job:
    """What one command extracts. missing: by split the hook points that are not finished."""

    args: argparse.Namespace
    documents: Documents
    writer: UnitWriter
    points: list[str]
    made_from: dict[str, Any]
    missing: dict[str, list[str]]

    def folder(self, point: str, split: str) -> Path:
        """Where the shards of a split go."""
        return self.args.out / folder_name(point) / split

    def unit(self, point: str, split: str, number: int) -> Path:
        """Where a unit waits for the others."""
        return self.folder(point, split) / units_name(self.made_from, self.args.batch_size) / f"{number:06d}"


def prepare(args: argparse.Namespace, topology: Topology) -> Job:
    """Read input and model. UserError for all that can be known to be wrong before the model runs."""
    for name in ("batch_size", "context", "rows_per_block", "shard_mb", "unit_kb"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("skip_first", "heldout"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    if args.device_map and topology.world > 1:
        raise UserError("--device-map auto takes all devices: start one process")
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    documents = open_documents(settings)
    own_device = args.device == "cuda" and topology.world > 1
    model, tokenizer = load_language_model(
        args.model, topology.device if own_device else args.device, COMPUTE[args.precision], args.device_map
    )
    points = chosen_points(args, model)
    made_from = identity(settings, model) | {name: getattr(args, name) for name in ("rows_per_block", "shard_mb")}

    def spec(point: str, width: int) -> ShardSpec:
        return ShardSpec(
            width=width,
            dtype=args.dtype,
            concepts=documents.concepts,
            answers=documents.answers,
            model=args.model,
            hook_point=point,
            extra=made_from,
        )

    extractor = Extractor(model, Windows(settings, documents, tokenizer), tokenizer.pad_token_id)
    writer = UnitWriter(extractor, spec, args.rows_per_block, args.shard_mb << 20)
    job = Job(args, documents, writer, points, made_from, {})
    job.missing = {
        split: [p for p in points if args.overwrite or not finished(job.folder(p, split), made_from)]
        for split in SPLITS
        if documents.units[split]
    }
    return job


def finished(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether `folder` holds this very extraction. UserError when it holds another one."""
    if not (folder / MANIFEST_NAME).exists():
        return False
    found = Manifest.load(folder).extra
    different = [name for name, value in made_from.items() if found.get(name, value) != value]
    if different or not found:
        raise UserError(
            f"{folder} holds an extraction with another {', '.join(different) or 'source'}: "
            "choose another --out or pass --overwrite"
        )
    return True


def unfinished(job: Job, split: str, topology: Topology) -> list[int]:
    """Units that are missing at a hook point, as the main process sees it. Called by all."""
    numbers = range(len(job.documents.units[split])) if topology.is_main else ()
    found = [n for n in numbers if not all(is_finished(job.unit(p, split, n)) for p in job.missing[split])]
    return json.loads(topology.share(json.dumps(found).encode())[0])


def deal(units: list[int], sizes: list[int], world: int) -> list[list[int]]:
    """The units of each process: the largest ones first, each to whom has least."""
    dealt: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for unit in sorted(units, key=lambda u: -sizes[u]):
        rank = load.index(min(load))
        dealt[rank].append(unit)
        load[rank] += sizes[unit]
    return dealt


def extract_units(job: Job, split: str, topology: Topology) -> None:
    """Do this process's share of the units that are not finished."""
    units = job.documents.units[split]
    mine = deal(unfinished(job, split, topology), job.documents.sizes[split], topology.world)[topology.rank]
    title = split if topology.world == 1 else f"{split}, process 1 of {topology.world}"
    extractor = job.writer.extractor
    with tqdm(
        total=sum(len(units[u]) for u in mine), desc=title, unit=job.documents.item, disable=not topology.is_main
    ) as bar:
        for number in mine:
            folders = {point: job.unit(point, split, number) for point in job.missing[split]}
            todo = {point: folder for point, folder in folders.items() if not is_finished(folder)}
            extractor.progress = moving(bar, len(units[number]), extractor.clock)
            if todo:
                job.writer.write(units[number], todo, unit_name(split, number))
            extractor.progress(1.0)


def moving(bar: Any, size: int, clock: Clock) -> Callable[[float], None]:
    """Takes the share of a unit of `size` documents that was read, and moves the bar there."""
    start, tokens, began = bar.n, clock.tokens, time.perf_counter()

    def move(share: float) -> None:
        bar.set_postfix_str(f"{(clock.tokens - tokens) / (time.perf_counter() - began):.0f} tokens/s", refresh=False)
        bar.update(start + int(share * size) - bar.n)

    return move


def finish(job: Job, point: str, split: str) -> None:
    """Make one data set of all units of a hook point and split, and remove what is left of them."""
    folder = job.folder(point, split)
    units = [job.unit(point, split, number) for number in range(len(job.documents.units[split]))]
    for unit in units:
        if not is_finished(unit):
            raise UserError(f"{unit} is not there: all processes must write to the same --out, on a shared file system")
    kept = [unit for unit in units if (unit / MANIFEST_NAME).exists()]
    if not kept:
        raise UserError(f"{folder}: none of the tokens is a row; check --skip-first and --drop-special")
    statistics = joined(kept)
    facts = {
        **job.made_from,
        "token_position": job.documents.token_position,
        "norms": statistics.norms.report(MAX_NORM),
    }
    spec = replace(job.writer.spec(point, statistics.width), extra=facts)
    if split != "train":
        train = Manifest.load(job.folder(point, "train"))
        join_parts(folder, split, spec, kept, (train.mean, train.scale))
    else:
        join_parts(folder, split, spec, kept, statistics.result(str(folder)), statistics.median_norm)
    for left in folder.glob(".units-*"):
        shutil.rmtree(left, ignore_errors=True)


def report(job: Job, point: str, split: str) -> None:
    """Print what a finished split holds."""
    folder = job.folder(point, split)
    manifest = Manifest.load(folder)
    kept = "" if point in job.missing[split] else " (finished before, kept)"
    print(f"{folder}: {manifest.rows} rows of width {manifest.width}{kept}")
    if norms := manifest.extra.get("norms"):
        print(
            f"  norms: median {norms['median'] or 0:.4g}, 99% below {norms['percentile_99'] or 0:.4g}, "
            f"largest {norms['largest']:.4g}; {norms['giant_rows']} rows above {MAX_NORM:g} medians hold "
            f"{norms['giant_variance']:.1%} of the variance"
        )


def report_speed(clock: Clock, topology: Topology) -> None:
    """Print tokens per second of all processes, and the share of their time that the model took. Called by all."""
    clocks = [json.loads(text) for text in topology.share(json.dumps(vars(clock)).encode())]
    tokens, longest = sum(c["tokens"] for c in clocks), max(c["total"] for c in clocks)
    if not tokens or not topology.is_main:
        return
    share = sum(c["model"] for c in clocks) / sum(c["total"] for c in clocks)
    processes = f", {topology.world} processes" if topology.world > 1 else ""
    print(
        f"{tokens} tokens in {longest:.1f} s: {tokens / longest:.0f} tokens/s{processes}, "
        f"{share:.1%} of the time in the model"
    )


def meet() -> Topology:
    """The processes that a launcher started."""
    if launched_world()[2] == 1:
        return Topology()
    from trainer.strategies import Layout, join  # imports engines, which take seconds

    return join(Layout("ddp", timeout=PATIENCE))


def run(args: argparse.Namespace) -> int:
    """Extract what is not finished."""
    topology = meet()
    job, problem = None, ""
    try:
        job = prepare(args, topology)
    except UserError as error:
        problem = str(error)
    decide(problem if topology.is_main else "", topology)
    if job is None:
        raise UserError(problem)
    require_agreement({name: str(value) for name, value in job.made_from.items()}, topology)
    for split in job.missing:
        if job.missing[split]:
            extract_units(job, split, topology)
    report_speed(job.writer.extractor.clock, topology)
    if topology.is_main:
        try:
            for split, points in job.missing.items():
                for point in job.points:
                    if point in points:
                        finish(job, point, split)
                    report(job, point, split)
        except UserError as error:
            problem = str(error)
    decide(problem, topology)
    return 0
