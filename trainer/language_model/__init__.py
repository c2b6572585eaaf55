"""Causal language models: loading, prompts to token batches, residual capture and edits, greedy answers."""

from trainer.language_model.capture import (
    block_part,
    capture,
    check_layers,
    find_blocks,
    hook_point,
    module_at,
)
from trainer.language_model.chats import Message, chat_text
from trainer.language_model.editable import EditableModel, ReadPrompts
from trainer.language_model.editing import Edit, Tokens, edit_tokens, hook_layer
from trainer.language_model.examples import Example, Span, read_example
from trainer.language_model.loading import last_token, load_language_model, load_tokenizer
from trainer.language_model.matching import RULES, Match, answer_matches, matcher, suggested_rule
from trainer.language_model.prompts import (
    SPLITS,
    Prompt,
    batched,
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
    "SPLITS",
    "Edit",
    "EditableModel",
    "Example",
    "Match",
    "Message",
    "Prompt",
    "ReadPrompts",
    "Span",
    "Tokens",
    "answer_matches",
    "batched",
    "block_part",
    "capture",
    "chat_text",
    "check_layers",
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
    "load_tokenizer",
    "matcher",
    "module_at",
    "open_data_set",
    "read_example",
    "read_json_lines",
    "read_prompts",
    "read_texts",
    "suggested_rule",
]
