"""Which hook points `alignsae extract` was asked for, and the folders of their shards."""

import argparse
from typing import Any

from trainer.errors import UserError
from trainer.language_model import block_part, check_layers, hook_point, module_at


def chosen_points(args: argparse.Namespace, model: Any) -> list[str]:
    """Hook points of --layers and --hooks. UserError when there are none, or one does not exist."""
    points = [hook_point(layer) for layer in parse_layers(args.layers, model)] if args.layers else []
    points += [name.strip() for name in args.hooks.split(",")] if args.hooks else []
    if not points:
        raise UserError("nothing to extract: give --layers 6 or --hooks blocks.6.hook_mlp_out, for example")
    for point in points:
        module_at(model, point)
    return list(dict.fromkeys(points))


def parse_layers(text: str, model: Any) -> list[int]:
    """Sorted layer indices of `--layers`. UserError when one is no number or out of range."""
    if text == "all":
        return list(range(model.config.get_text_config(decoder=True).num_hidden_layers))
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--layers {text!r}: give comma-separated block indices such as 0,5 or `all`") from error
    check_layers(model, layers)
    return layers


def folder_name(point: str) -> str:
    """layer-06 for blocks.6.hook_resid_post; other hook points name their folder themselves."""
    layer, part = block_part(point) or (0, "")
    return f"layer-{layer:02d}" if part == "resid_post" else point
