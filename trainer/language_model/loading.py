"""Loading a causal language model, and where the prompts of a batch end. B prompts, T tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError


def load_language_model(
    path_or_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """Frozen causal language model in evaluation mode and its tokenizer, which is sure to have a padding token.

    `path_or_id` is a `save_pretrained` folder or the name of a model on the hub; only safetensors weights are read.
    `device_map="auto"` spreads the model over all devices of this process, in place of `device`.
    UserError when it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    source, tokenizer = str(path_or_id), load_tokenizer(path_or_id)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, device_map=device_map
        )
    except Exception as error:  # transformers, tokenizers and safetensors raise a dozen unrelated types here
        raise _unreadable(source, error) from error
    placed = model if device_map else model.to(device)
    return placed.eval().requires_grad_(False), tokenizer


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The tokenizer of a language model, sure to have a padding token. UserError when it cannot be read."""
    from transformers import AutoTokenizer

    source = str(path_or_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # as above
        raise _unreadable(source, error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {source!r} has neither a padding nor an end token: add one and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _unreadable(source: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"cannot load a language model from {source!r}: {reason}")


def last_token(mask: Tensor) -> Tensor:
    """Column [B] of the last real token of each row of an attention mask [B, T], whichever side is padded."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * columns).argmax(dim=1)
