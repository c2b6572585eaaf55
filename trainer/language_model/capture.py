"""Hook points of a language model, and what flows through them in one forward pass.

| name | what is read |
|---|---|
| `blocks.L.hook_resid_post` | the residual stream AFTER the block with 0-based index L: the output of `blocks[L]` |
| `blocks.L.hook_attn_out` | what the attention of that block gives, as its module returns it |
| `blocks.L.hook_mlp_out` | what the MLP of that block gives, as its module returns it |
| a module's path, `model.layers.3.mlp.up_proj` | the output of that module |

(transformers' `hidden_states[L + 1]` is `blocks.L.hook_resid_post` for every block but the last, where transformers
applies the final norm first.) A layer number L is short for `blocks.L.hook_resid_post`.

B prompts, T tokens, D width at the hook point.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer.errors import UserError

Point = TypeVar("Point", int, str)
_NAMED = re.compile(r"blocks\.(\d+)\.hook_(resid_post|attn_out|mlp_out)\Z")
# What architectures call the parts of a block.
_PARTS = {
    "attn_out": ("attn", "self_attn", "attention", "self_attention"),
    "mlp_out": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}


class _AllSeen(Exception):
    """Raised by a hook to leave the forward pass once every wanted point has been seen."""


def hook_point(layer: int) -> str:
    """Name of the residual stream after block `layer`, as written into manifests."""
    return f"blocks.{layer}.hook_resid_post"


def block_part(point: str) -> tuple[int, str] | None:
    """Layer and part (resid_post, attn_out or mlp_out) that `blocks.L.hook_PART` names; None for any other name."""
    named = _NAMED.match(point)
    return (int(named[1]), named[2]) if named else None


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the outermost ModuleList with one entry per hidden layer of the configuration."""
    config: Any = model.config
    count = config.get_text_config(decoder=True).num_hidden_layers
    lists = [(n.count("."), n) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no ModuleList of {count} blocks: this architecture cannot be hooked"
        )
    return model.get_submodule(min(lists)[1])  # type: ignore[return-value]


def check_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """UserError when one of `layers` is no block of `model`."""
    count = len(find_blocks(model))
    for layer in layers:
        if not 0 <= layer < count:
            raise UserError(f"layer {layer} does not exist: the model has layers 0 to {count - 1}")


def module_at(model: nn.Module, point: int | str) -> nn.Module:
    """The module whose output is the hook point. UserError when the model has no such place."""
    if isinstance(point, int):
        check_layers(model, [point])
        point = hook_point(point)
    if named := block_part(point):
        layer, part = named
        check_layers(model, [layer])
        block = find_blocks(model)[layer]
        if part == "resid_post":
            return block
        children = dict(block.named_children())
        for name in _PARTS[part]:
            if name in children:
                return children[name]
        raise UserError(
            f"hook point {point}: the blocks of {type(model).__name__} have no part called "
            f"{' or '.join(_PARTS[part])}, but {', '.join(children)}; name the module by its path"
        )
    modules = dict(model.named_modules())
    if point not in modules or not point:
        near = ", ".join(get_close_matches(point, modules, n=3, cutoff=0.3)) or "none"
        raise UserError(
            f"hook point {point!r}: no module of that name in {type(model).__name__}; the nearest are {near}. "
            "blocks.L.hook_resid_post, hook_attn_out and hook_mlp_out name the parts of block L"
        )
    return modules[point]


def output_of(output: Any) -> Tensor:
    """The tensor that a block or part returns, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def accepted(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Those of the options that the model's forward pass takes."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in options.items() if name in known}


def positions(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Positions [B, T] of tokens by their mask, as an option of the forward pass where it takes one.

    A plain forward pass numbers positions from the first column; with padding on the left that would shift them.
    """
    return accepted(model, position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0))


@torch.no_grad()
def capture(model: Any, input_ids: Tensor, attention_mask: Tensor, points: Sequence[Point]) -> dict[Point, Tensor]:
    """Activations [B, T, D] at each of `points` (D may differ), in one forward pass that ends when all have been seen.

    Rows of padding hold whatever the model computes there. UserError for a point that does not exist, is not reached,
    or gives no tensor [B, T, D].
    """
    modules = {point: module_at(model, point) for point in points}
    found: dict[Point, Tensor] = {}

    def keep(point: Point) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[point] = output_of(output)
            if len(found) == len(modules):
                raise _AllSeen

        return hook

    handles = [module.register_forward_hook(keep(point)) for point, module in modules.items()]
    try:
        with suppress(_AllSeen):
            model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions(model, attention_mask)
            )
    finally:
        for handle in handles:
            handle.remove()
    for point in modules:
        acts = found.get(point)
        if not isinstance(acts, Tensor) or acts.ndim != 3 or acts.shape[:2] != input_ids.shape:
            shape = tuple(acts.shape) if isinstance(acts, Tensor) else "nothing" if acts is None else type(acts)
            raise UserError(f"hook point {point} gives {shape}, not one vector per token; choose another module")
    return found
