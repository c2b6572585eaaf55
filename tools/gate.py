"""Give a trained relu dictionary a threshold and one gain, without training

  alignsae gate runs/mine --l0 32 --rows data/mine/train --heldout data/mine/heldout --out gated/mine

The threshold is the one above which --l0 entries a row lie on average, in units in which decoder rows have norm 1; the
gain of all codes is then the one with the least squared error. Both are taken from up to 8,192 rows of --rows. What is
written is a folder as `alignsae import` writes it, with the gate batch_topk: dictionary.start_from and `load` read it.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from trainer import pretrained
from trainer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae gate`."""
    parser.add_argument("source", metavar="RUN", help="run, checkpoint or any other dictionary that `import` reads")
    parser.add_argument("--l0", type=int, required=True, help="mean active slots of a row")
    parser.add_argument("--rows", metavar="SHARDS", required=True, help="rows to fit on")
    parser.add_argument("--heldout", metavar="SHARDS", help="rows to measure on as well")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")


def run(args: argparse.Namespace) -> None:
    """Fit, write, report."""
    pretrained.refuse_existing(args.out)
    if args.l0 < 1:
        raise UserError(f"--l0 {args.l0} must be at least 1")
    splits = {"fitted": args.rows} | ({"heldout": args.heldout} if args.heldout else {})
    rows = {name: pretrained.sample(folder) for name, folder in splits.items()}
    with pretrained.new_folder(args.out) as (partial, scratch):
        source = pretrained.open_source(args.source, scratch)
        for name, h in rows.items():
            if h.shape[1] != source.width:
                raise UserError(
                    f"{splits[name]} has rows of width {h.shape[1]}, the dictionary {source.width}; give rows of its "
                    f"hook point"
                )
        gated = pretrained.fit_gate(source, rows["fitted"], args.l0)
        found = {"as it was": gated.before, "fitted rows": gated.after}
        if args.heldout:
            found["held-out rows"] = gated.measure(rows["heldout"])
        measured = {name: asdict(figures) for name, figures in found.items()} | {"gain": gated.source.gain}
        pretrained.write(gated.source, partial, theta=gated.theta, k=float(args.l0), measured=measured)
        del source  # it may have files of the scratch folder open
    print(f"written: {args.out} (threshold {gated.theta:.5g} and gain {gated.source.gain:.4f} for all slots)")
    for name, figures in found.items():
        fvu = "unknown" if figures.fvu is None else f"{figures.fvu:.4f}"
        print(f"{name}: L0 {figures.l0:.2f}, FVU {fvu} on {figures.rows} rows")
