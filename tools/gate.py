"""What `alignsae gate` does; its arguments and its help are in tools/parsers."""

import argparse
from dataclasses import asdict

from trainer import pretrained
from trainer.errors import UserError


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
