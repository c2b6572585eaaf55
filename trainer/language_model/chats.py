"""Chats as text: what a tokenizer's chat template makes of messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """Messages as a row of a JSONL file has them."""

    messages: tuple[Message, ...]


def chat_text(tokenizer: Any, messages: Sequence[Message], where: str) -> str:
    """The template's text, special tokens included: with the opening of the answer behind a user's message, left open
    at its end behind one of the assistant. UserError naming `where` when there is no template or it refuses."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where}: messages, but the tokenizer has no chat template")
    answered = messages[-1].role == "assistant"
    try:
        return tokenizer.apply_chat_template(
            [vars(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not answered,
            continue_final_message=answered,
        )
    except Exception as error:  # jinja and the template itself raise what they like
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: the chat template refuses these messages: {reason}") from error


def chat_prompt(tokenizer: Any, messages: Sequence[Message], where: str) -> str:
    """The same as a prompt, to which the tokenizer adds its special tokens: it becomes the template's own tokens.

    UserError naming `where` when the tokenizer adds others.
    """
    text = chat_text(tokenizer, messages, where)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    for prompt in (text, text.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(prompt)["input_ids"] == wanted:
            return prompt
    raise UserError(f"{where}: the tokenizer adds special tokens that its chat template lacks; write it as a prompt")
