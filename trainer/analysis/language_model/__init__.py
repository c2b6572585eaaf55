"""Causal language models: loading, prompts to token batches, residual capture and edits, greedy answers."""

from trainer.analysis.language_model.capture import (
    block_part,
    capture,
    check_layers,
    find_blocks,
    hook_point,
    module_at,
)
from trainer.analysis.language_model.editing import Tokens, edit_residual, edit_tokens, hook_layer
from trainer.analysis.language_model.examples import Example, Message, Span, read_example
from trainer.analysis.language_model.loading import last_token, load_language_model
from trainer.analysis.language_model.matching import RULES, Match, answer_matches, matcher, suggested_rule
from trainer.analysis.language_model.prompts import (
    Prompt,
    encode_answer,
    encode_prompts,
    generate_answers,
    json_object,
    open_data_set,
    read_json_lines,
    read_prompts,
    read_texts,
)

__all__ = [
    "RULES",
    "Example",
    "Match",
    "Message",
    "Prompt",
    "Span",
    "Tokens",
    "answer_matches",
    "block_part",
    "capture",
    "check_layers",
    "edit_residual",
    "edit_tokens",
    "encode_answer",
    "encode_prompts",
    "find_blocks",
    "generate_answers",
    "hook_layer",
    "hook_point",
    "json_object",
    "last_token",
    "load_language_model",
    "matcher",
    "module_at",
    "open_data_set",
    "read_example",
    "read_json_lines",
    "read_prompts",
    "read_texts",
    "suggested_rule",
]
