"""Write activations of a causal language model as tar shards, several hook points in one pass.

  alignsae extract --model M --prompts questions.jsonl --layers 1,2 --out data/demo
  alignsae extract --model M --texts corpus.jsonl --field text --layers 12 --out data/corpus
  accelerate launch --multi_gpu --num_processes 8 -m tools.cli extract --model M --texts corpus --layers 12 --out data/c

Layer L is the residual stream after the block with 0-based index L, `blocks.L.hook_resid_post`; it is written to
OUT/layer-L/{train,heldout}. --hooks names other places: blocks.L.hook_attn_out, blocks.L.hook_mlp_out or the path of
any module; each is written to OUT/NAME.

--prompts reads JSONL rows of three kinds. `prompt` (text) or `messages` (a chat, for the tokenizer's template) give one
row each, the activation at the last token. `text` gives a row per token: with `spans: [{start, end, concept}]` the
tokens that overlap these characters carry the concept, and --outside says what the others are; else all tokens carry
the label of the row. `concept` or `concepts` label a row; without them it is unlabelled, with an empty list it has
explicitly none. `answer` and `split` (train or heldout) may be absent. --texts reads unlabelled text, a row per token.

Concepts are the names in order of first appearance (or --concepts; rows of other concepts become unlabelled). Rows keep
the order of the input. The held-out split carries the normalisation of the training split.

Work is divided into units of --unit-kb of text, which any number of processes deal among themselves: the shards are
the same, byte for byte, on the same kind of device (on CPUs with the same OMP_NUM_THREADS). All processes must see OUT.
Nothing appears under its final name before it is complete; after an interruption the same command goes on with the
units and splits that are not finished. A unit is held in memory at all its hook points: lower --unit-kb where that is
too much.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tools.extraction.documents import SPLITS, Documents, open_documents
from tools.extraction.identity import identity, units_name
from tools.extraction.places import chosen_points, folder_name
from tools.extraction.units import Clock, Extractor, is_finished, joined
from tools.extraction.windows import OUTSIDE, Windows
from trainer.agreement import decide, require_agreement
from trainer.analysis.language_model import load_language_model
from trainer.errors import UserError
from trainer.stream import Manifest, ShardSpec
from trainer.stream.manifest import FILE_NAME as MANIFEST_NAME
from trainer.stream.normalisation import MAX_NORM
from trainer.stream.parts import join_parts
from trainer.topology import Topology, launched_world

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATIENCE = 7 * 24 * 3600.0  # seconds that a process waits for the others, which may have a unit more to do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae extract`."""
    parser.add_argument("--model", required=True, help="save_pretrained folder or hub name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help="JSONL of labelled rows: prompts, chats, texts")
    source.add_argument("--texts", type=Path, help="JSONL file or datasets folder of unlabelled text")
    parser.add_argument("--layers", help="comma-separated block indices, 0-based, or `all`")
    parser.add_argument("--hooks", help="comma-separated hook points, blocks.3.hook_mlp_out or a module's path")
    parser.add_argument("--out", required=True, type=Path, help="folder that receives layer-LL/{train,heldout}")
    parser.add_argument("--concepts", help="comma-separated concept names in slot order (default: as they appear)")
    parser.add_argument(
        "--outside",
        choices=OUTSIDE,
        default="none",
        help="tokens outside of all spans are (default: %(default)s)",
    )
    parser.add_argument("--field", default="text", help="field of --texts that holds the text (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=512, help="longest window of a text, tokens (default: %(default)s)"
    )
    parser.add_argument("--skip-first", type=int, default=0, help="drop the first N tokens of each window of a text")
    parser.add_argument("--drop-special", action="store_true", help="drop special tokens of a text")
    parser.add_argument(
        "--heldout", type=int, default=0, metavar="N", help="every N-th row without a split is held out (0 = none)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="sequences per forward pass (default: %(default)s)")
    parser.add_argument("--unit-kb", type=int, default=256, help="KiB of text per unit of work (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=COMPUTE, default="fp32", help="of the forward pass (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=["float16", "float32", "bfloat16"], default="float16", help="as stored")
    parser.add_argument("--rows-per-block", type=int, default=4096, help="rows per tar sample (default: %(default)s)")
    parser.add_argument("--shard-mb", type=int, default=512, help="most MiB per tar file (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--device-map", choices=["auto"], help="spread a model that is larger than a device over all of them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace finished splits in OUT")


@dataclass
class Job:
    """What one command extracts. missing: by split the hook points that are not finished."""

    args: argparse.Namespace
    documents: Documents
    extractor: Extractor
    points: list[str]
    made_from: dict[str, Any]
    missing: dict[str, list[str]]

    def folder(self, point: str, split: str) -> Path:
        """Where the shards of a split go."""
        return self.args.out / folder_name(point) / split

    def unit(self, point: str, split: str, number: int) -> Path:
        """Where a unit waits for the others."""
        return self.folder(point, split) / units_name(self.args, self.made_from) / f"{number:06d}"


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
    documents = open_documents(args)
    own_device = args.device == "cuda" and topology.world > 1
    model, tokenizer = load_language_model(
        args.model, topology.device if own_device else args.device, COMPUTE[args.precision], args.device_map
    )
    points = chosen_points(args, model)
    made_from = identity(args, model)

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

    extractor = Extractor(args, model, Windows(args, documents, tokenizer), tokenizer.pad_token_id, spec)
    job = Job(args, documents, extractor, points, made_from, {})
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
    clock = job.extractor.clock
    with tqdm(
        total=sum(len(units[u]) for u in mine), desc=title, unit=job.documents.item, disable=not topology.is_main
    ) as bar:
        for number in mine:
            folders = {point: job.unit(point, split, number) for point in job.missing[split]}
            todo = {point: folder for point, folder in folders.items() if not is_finished(folder)}
            if todo:
                job.extractor.write(units[number], todo, f"{split}-{number:06d}")
                bar.set_postfix_str(f"{clock.tokens / clock.total:.0f} tokens/s")
            bar.update(len(units[number]))


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
    facts = {**job.made_from, "norms": statistics.norms.report(MAX_NORM)}
    spec = replace(job.extractor.spec(point, statistics.width), extra=facts)
    if split == "heldout":
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
    report_speed(job.extractor.clock, topology)
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
