"""What `alignsae plan` does; its arguments and its help are in tools/parsers."""

import argparse
import json
from dataclasses import asdict

from tools.planning import seconds
from tools.planning.estimate import Workload, estimate, smallest
from trainer.config import Config, load_config
from trainer.dictionary import DictionaryConfig
from trainer.errors import UserError
from trainer.inputs import begun
from trainer.optimizer import STATE_DTYPES
from trainer.strategies import STRATEGIES
from trainer.stream import Sources, load_manifests

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
COLUMNS = {  # field of Estimate -> heading
    **{name: name for name in ("weights", "gradients", "optimizer", "buffers", "activations", "build")},
    "snapshot": "snapshot (host)",
    "total": "total",
}


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    memory = parse_size(args.device_memory)
    if args.devices < 1:
        raise UserError(f"--devices {args.devices} must be at least 1")
    if args.scaling:
        print(scaling_table(memory))
        return 0
    if not args.config:
        raise UserError("--config is missing; give a YAML file, or --scaling for the general table")
    config, work = read_workload(args)
    how = {"gloo": args.backend == "gloo", "offload": config.parallel.offload}
    how["snapshots"] = config.checkpoint.asynchronous and config.checkpoint.every > 0
    found = [(s, estimate(work, s, args.devices, **how)) for s in STRATEGIES]
    form, elements = work.form, work.free() + work.shared
    print(
        f"{form.free_slots:,} free slots in {form.banks} banks, {len(form.concepts)} concepts, width {form.width}: "
        f"{elements:,} parameters; {work.rows} rows a step on {args.devices} devices of {args.device_memory}\n"
    )
    widths = [max(13, len(heading) + 2) for heading in COLUMNS.values()]
    head = "".join(f"{heading:>{width}}" for heading, width in zip(COLUMNS.values(), widths, strict=True))
    print(f"{'strategy':<11}{head}{'sent/step':>13}{'fits':>6}{'fits from':>11}")
    for strategy, e in found:
        fewest = smallest(work, strategy, memory, **how)
        if e is None:
            cells, fits, sent = ["-"] * len(COLUMNS), "-", "-"
        else:
            cells = [human(getattr(e, name)) for name in COLUMNS]
            fits, sent = ("yes" if e.total <= memory else "no"), human(sum(e.sent.values()))
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{strategy:<11}{row}{sent:>13}{fits:>6}{fewest if fewest else 'never':>11}")
    print("\nBytes that a rank sends in a step:")
    for strategy, e in found:
        for what, size in (e.sent if e else {}).items():
            print(f"  {strategy:<11}{human(size):>11}  {what}")
    if args.device_name:
        if args.l0 <= 0:
            raise UserError(f"--l0 {args.l0} must be above 0")
        print("\n" + seconds.table(work, [e for _, e in found if e], args.device_name, args.l0))
    if args.json:
        args.json.write_text(json.dumps([asdict(e) | {"total": e.total} for _, e in found if e], indent=1) + "\n")
    return 0


def read_workload(args: argparse.Namespace) -> tuple[Config, Workload]:
    """Sizes from configuration and manifest. Raises UserError when there is neither a manifest nor --width."""
    config = load_config(args.config, args.overrides)
    if args.width is None:
        try:
            manifest = Sources(load_manifests(config.data)).manifest
        except UserError as error:
            raise UserError(f"{error}; or give --width and --concepts") from error
        config = begun(config, manifest)
        width, concepts, answers = manifest.width, len(manifest.concepts), len(manifest.answers)
    else:
        width, concepts, answers = args.width, args.concepts, args.answers
    if width < 1 or concepts < 0 or answers < 0:
        raise UserError(f"--width {width}, --concepts {concepts} and --answers {answers} cannot be")
    form = config.dictionary.form(width, [str(number) for number in range(concepts)], answers)
    rows = -(-config.data.global_batch // config.optim.accumulate)
    moment = STATE_DTYPES[config.optim.state].itemsize
    return config, Workload(form, rows, config.run.precision == "bf16", moment)


def scaling_table(memory: int) -> str:
    """Markdown: 100k, 1M and 16M slots by width, and what they need from 1 to 512 devices."""
    lines = [
        "| slots | width | parameters | single | devices | ddp | zero3 | dictionary | dictionary sends "
        f"| fits {human(memory)} from |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for slots in (100_000, 2**20, 2**24):
        for width in (768, 2048, 4096, 8192):
            form = DictionaryConfig(slots).form(width, [str(number) for number in range(100)], 1000)
            work = Workload(form, 8192, True)
            alone = estimate(work, "single", 1)
            fewest = [smallest(work, s, memory) or "never" for s in ("zero3", "dictionary")]
            for devices in (8, 64, 512):
                found = {s: estimate(work, s, devices) for s in ("ddp", "zero3", "dictionary")}
                cells = [human(e.total) if e else "more ranks than banks" for e in found.values()]
                sent = human(sum(found["dictionary"].sent.values())) if found["dictionary"] else "-"
                single = human(alone.total) if alone else "-"
                head = f"| {slots:,} | {width} | {(work.free() + work.shared) / 1e9:.2f} G | {single} "
                lines.append(f"{head}| {devices} | {' | '.join(cells)} | {sent} | {fewest[0]} / {fewest[1]} |")
    return "\n".join(lines)


def parse_size(text: str) -> int:
    """`80GiB` -> bytes. Raises UserError for anything else."""
    number = text.rstrip("BKMGTi")
    unit = text[len(number) :] or "B"
    try:
        size = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise UserError(f"--device-memory {text} is not a size; write for example 80GiB or 512MiB") from None
    if not 0 < size < 2**60:
        raise UserError(f"--device-memory {text} must be above 0")
    return int(size)


def human(size: float) -> str:
    """Bytes with a binary unit."""
    unit = next(u for u, factor in reversed(UNITS.items()) if size >= factor or u == "B")
    return f"{size / UNITS[unit]:.{0 if unit == 'B' else 2}f} {unit}"
