"""What `alignsae reproduce` does; its arguments and its help are in tools/parsers."""

import argparse
import io
from pathlib import Path

from tools.reproducing.pages import horizon, markdown
from tools.reproducing.paper import SCALES, STAGES_FILE, collect, stages
from tools.reproducing.stages import read_done, run_stages
from trainer.errors import UserError
from trainer.files import write_result

CONFIG = Path(__file__).parent / "configs" / "paper.yaml"


def run(args: argparse.Namespace) -> int:
    """Run what is not done yet, then write the tables."""
    scale = SCALES[args.scale]
    layers = chosen_layers(args.layers, scale.layers)
    steps = list(stages(args.out, scale, layers, args.config or CONFIG, args.launch))
    if args.list:
        done = read_done(args.out / STAGES_FILE)
        for stage in steps:
            print(f"{'done' if stage.name in done else '    '}  {stage.line}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if code := run_stages(steps, args.out / STAGES_FILE):
        return code
    found = collect(args.out, layers)
    text, image = markdown(found), io.BytesIO()
    horizon(found).savefig(image, format="png")
    write_result(args.out / "results.json", found)
    write_result(args.out / "results.md", text)
    write_result(args.out / "results.png", image.getvalue())
    print(text)
    print(f"written: {args.out / 'results.md'}, results.json, results.png")
    return 0


def chosen_layers(text: str, layers: int) -> list[int]:
    """Block indices of --layers in order. Raises UserError for what is none of the model's."""
    if text == "all":
        return list(range(layers))
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--layers {text!r} is neither `all` nor block indices like 0,5,6") from error
    if not 0 <= found[0] <= found[-1] < layers:
        raise UserError(f"--layers {text}: the model of this scale has blocks 0 to {layers - 1}")
    return found
