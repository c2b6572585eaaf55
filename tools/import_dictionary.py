"""What `alignsae import` does; its arguments and its help are in tools/parsers."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import pretrained
from trainer.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Read, convert, write under a temporary name, rename."""
    pretrained.refuse_existing(args.out)
    rows = pretrained.sample(args.rows) if args.rows else None
    with pretrained.new_folder(args.out) as (partial, scratch):
        source = pretrained.open_source(args.source, scratch)
        source.facts.model = args.model or source.facts.model
        source.facts.hook_point = args.hook_point or source.facts.hook_point
        description = convert(source, partial, rows, str(args.rows))
        del source  # it has files of the scratch folder open
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
