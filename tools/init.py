"""What `alignsae init` does; its arguments and its help are in tools/parsers."""

import argparse
import re
from difflib import get_close_matches
from pathlib import Path

from trainer.errors import UserError
from trainer.files import write_result

HERE = Path(__file__).parent
CONFIGS, LAUNCHES = HERE / "configs", HERE / "launch" / "accelerate"


def run(args: argparse.Namespace) -> None:
    """Copy both files, with run.dir inside of DIR and data.shards as asked for; held-out rows are those beside them."""
    targets = {
        args.dir / "train.yaml": _text(CONFIGS, args.config, "--config"),
        args.dir / "launch.yaml": _text(LAUNCHES, args.launch, "--launch"),
    }
    for path in targets:
        if path.exists():
            raise UserError(f"{path} already exists; name another folder")
    config = _set(targets[args.dir / "train.yaml"], "dir", str(args.dir / "run"))
    if args.data:
        config = _set(config, "shards", args.data)
        config = _set(config, "heldout", f"{args.data.rstrip('/').rpartition('/')[0] or '.'}/heldout")
    targets[args.dir / "train.yaml"] = config
    for path, text in targets.items():
        write_result(path, text)
        print(f"written: {path}")
    print(f"next: alignsae train --launch {args.dir / 'launch.yaml'} --config {args.dir / 'train.yaml'}")


def _text(folder: Path, name: str, option: str) -> str:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.yaml"))}
    # Beside the configurations lie bars of a summary.
    known = [found for found, text in texts.items() if folder != CONFIGS or "\nstages:" in text]
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.0)
        raise UserError(f"{option} {name}: there is no such file; the nearest is {near[0]}, all are {', '.join(known)}")
    return texts[name]


def _set(text: str, key: str, value: str) -> str:
    """The text of a configuration with a key of two spaces of indentation set."""
    quoted = value.replace("'", "''")
    return re.sub(rf"(?m)^  {key}: .*$", lambda _: f"  {key}: '{quoted}'", text, count=1)
