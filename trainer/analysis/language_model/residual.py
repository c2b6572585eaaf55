"""Causal language models: loading, residual capture at several layers, residual edits and greedy answers.

**Layer numbers.** Layer L is the residual stream AFTER the block with 0-based index L, that is the output of
`blocks[L]`. Its hook point is named `blocks.L.hook_resid_post`. (transformers' `hidden_states[L + 1]` is the same
tensor for every block but the last, where transformers applies the final norm first.)

B prompts, T tokens, D model width.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError


class _LastLayerReached(Exception):
    """Raised by a hook to leave the forward pass once every wanted layer has been seen."""


def load_language_model(
    path_or_id: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Frozen causal language model in evaluation mode and its tokenizer, which is sure to have a padding token.

    `path_or_id` is a `save_pretrained` folder or the name of a model on the hub; only safetensors weights are read.
    UserError when it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(path_or_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except Exception as error:  # transformers, tokenizers and safetensors raise a dozen unrelated types here
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot load a language model from {source!r}: {reason}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {source!r} has neither a padding nor an end token: add one and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval().requires_grad_(False), tokenizer


def hook_point(layer: int) -> str:
    """Name of the residual stream after block `layer`, as written into manifests."""
    return f"blocks.{layer}.hook_resid_post"


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


def last_token(mask: Tensor) -> Tensor:
    """Column [B] of the last real token of each row of an attention mask [B, T], whichever side is padded."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * columns).argmax(dim=1)


def _positions(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    # A plain forward numbers positions from the first column; with padding on the left that would shift them.
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp_min(0)}


def _residual(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def capture(model: Any, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Residual stream [B, T, D] after each of `layers`, in one forward pass that ends at the last of them.

    Rows of padding hold whatever the model computes there. UserError on a layer out of range.
    """
    check_layers(model, layers)
    blocks, last = find_blocks(model), max(layers)
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[layer] = _residual(output)
            if layer == last:
                raise _LastLayerReached

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
    try:
        with suppress(_LastLayerReached):
            model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **_positions(model, attention_mask)
            )
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def edit_residual(model: Any, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active, the residual [B, D] after block `layer` at the last prompt token is replaced by `edit(residual)`.

    Only the pass over the prompt is edited, not the later decoding steps, and always the last column, so prompts must
    be padded on the left (as `generate_answers` does). UserError on a layer out of range.
    """
    check_layers(model, [layer])
    prompt_pass = True

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal prompt_pass
        cache = kwargs.get("past_key_values")
        prompt_pass = cache is None or cache.get_seq_length() == 0

    def after(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not prompt_pass:
            return None
        residual = _residual(output).clone()
        residual[:, -1] = edit(residual[:, -1]).to(residual.dtype)
        return (residual, *output[1:]) if isinstance(output, tuple) else residual

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        find_blocks(model)[layer].register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
