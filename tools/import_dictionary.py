"""Bring a dictionary that was trained elsewhere into a folder that `dictionary.start_from` begins with.

  alignsae import SOURCE --out imported/mine [--rows data/mine/layer-15/train]

SOURCE is a folder or an address below which one dictionary lies (local, hf://, s3://, https:// ...):
  SAELens      cfg.json, sae_weights.safetensors (standard, jumprelu, topk, batchtopk)
  sparsify     cfg.json, sae.safetensors (TopK)
  Gemma Scope  params.npz
  alignsae     a run, a checkpoint, or what `alignsae export` wrote

Weights are turned into such that act on raw activations. A dictionary that keeps the k largest of a row gets one
threshold instead, above which as many entries lie on average on the rows of --rows; what both do there is printed.
Pickle is never read.
"""

import argparse
import shutil
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer import pretrained
from trainer.errors import DataError, UserError
from trainer.stream import DataConfig, Manifest
from trainer.stream.shards import from_stored
from trainer.stream.source import BlockSource

ROWS = 8192  # rows that thresholds and figures are taken from, spread over the shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae import`."""
    parser.add_argument("source", metavar="SOURCE", help="folder, .npz file or address of one dictionary")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--rows", metavar="SHARDS", help="shard folder: thresholds of TopK, and L0 and FVU of any dictionary"
    )
    parser.add_argument("--model", help="model it is of, where the source says nothing or uses another name")
    parser.add_argument("--hook-point", help="hook point it is of, likewise (blocks.N.hook_resid_post)")


def run(args: argparse.Namespace) -> None:
    """Read, convert, write under a temporary name, rename."""
    if args.out.exists():
        raise UserError(f"{args.out} already exists; name a folder that does not")
    rows = sample(args.rows) if args.rows else None
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "scratch").mkdir(parents=True)
        source = pretrained.open_source(args.source, partial / "scratch")
        source.facts.model = args.model or source.facts.model
        source.facts.hook_point = args.hook_point or source.facts.hook_point
        description = convert(source, partial, rows, str(args.rows))
        del source  # it has files of the scratch folder open
        shutil.rmtree(partial / "scratch")
        partial.rename(args.out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {args.out}: {error}; free some space or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(args.out, description)


def convert(source: pretrained.Source, folder: Path, rows: Tensor | None, name: str) -> pretrained.Description:
    """Write the source into `folder`; rows [N, D] raw decide the threshold of TopK."""
    if rows is not None and rows.shape[1] != source.width:
        raise UserError(
            f"--rows {name} has width {rows.shape[1]}, the dictionary {source.width}; give rows of its hook point"
        )
    measured: dict[str, Any] = {}
    theta, k = None, source.k
    if source.top_k is not None:
        if rows is None:
            raise UserError(
                f"{source.facts.location} keeps the {source.top_k} largest of each row; its threshold is taken from "
                f"rows of its hook point: give a shard folder with --rows"
            )
        theta, true = pretrained.calibrate(source, rows)
        k, measured["top_k"] = float(source.top_k), asdict(true)
    if rows is not None:
        found = pretrained.measure(source, rows, theta)
        measured["threshold"] = asdict(found)
        k = found.l0 if k is None else k
    return pretrained.write(source, folder, theta=theta, k=k, measured=measured)


def sample(folder: str) -> Tensor:
    """Up to ROWS raw rows [N, D] fp32 of a shard folder, from blocks spread evenly over it."""
    manifest = Manifest.load(folder)
    blocks = len(manifest.blocks)
    wanted = min(blocks, -(-ROWS * blocks // manifest.rows) + 1)
    each = -(-ROWS // wanted)
    with closing(BlockSource(DataConfig(shards=folder), manifest)) as source:
        parts = []
        for number in range(wanted):
            block = source.rows(number * blocks // wanted)
            acts = from_stored(block.acts[block.valid], manifest.dtype).float()
            parts.append(acts[torch.linspace(0, len(acts) - 1, min(each, len(acts))).long()])
    rows = torch.cat(parts)
    if not bool(torch.isfinite(rows).all()):
        raise DataError(f"{folder}: holds NaN or infinite values; run `alignsae verify` on it")
    return rows


def report(out: Path, description: pretrained.Description) -> None:
    """What was imported, in a few lines."""
    facts = description.facts
    print(
        f"written: {out} ({facts.format} {facts.architecture}, {description.slots} slots of width {description.width}, "
        f"gate {description.gate}; model {facts.model or 'unknown'}, hook point {facts.hook_point or 'unknown'})"
    )
    names = {"top_k": "true top k", "threshold": "as imported"}
    for name, found in description.measured.items():
        fvu = "unknown" if found["fvu"] is None else f"{found['fvu']:.4f}"
        print(f"{names[name]}: L0 {found['l0']:.2f}, FVU {fvu} on {found['rows']} rows")
