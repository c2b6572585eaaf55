"""When a generated text counts as an answer."""

from collections.abc import Callable
from functools import partial
from typing import Any

Match = Callable[[str, str], bool]  # (generated, answer)
# From the strictest on; `--match` of the tools.
RULES = {
    "exact": "the whole first line is the answer",
    "prefix": "the first line begins with the words of the answer",
    "first": "the first token is that of the answer",
}


def answer_matches(generated: str, answer: str) -> bool:
    """Whether the whole generated answer equals `answer`, white space around them aside."""
    return generated.strip() == answer.strip()


def begins_with(generated: str, answer: str) -> bool:
    """Whether the generated text begins with the words of `answer`."""
    text, wanted = generated.strip(), answer.strip()
    return text.startswith(wanted) and not text[len(wanted) : len(wanted) + 1].isalnum()


def _same_first_token(tokenizer: Any, generated: str, answer: str) -> bool:
    first, wanted = (
        tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"][:1] for text in (generated, answer)
    )
    return first == wanted


def matcher(rule: str, tokenizer: Any) -> Match:
    """The rule of that name (see RULES)."""
    rules: dict[str, Match] = {
        "exact": answer_matches,
        "prefix": begins_with,
        "first": partial(_same_first_token, tokenizer),
    }
    return rules[rule]


def suggested_rule(shares: dict[str, float]) -> str:
    """The strictest rule that finds nearly what `prefix` finds; shares: of answered prompts, by rule. "" for none.

    A model that stops behind its answers is best held to them whole; the first token alone may be that of another
    answer, so it is the last resort.
    """
    if shares["exact"] > 0 and shares["exact"] >= 0.8 * shares["prefix"]:
        return "exact"
    return "prefix" if shares["prefix"] > 0 else "first" if shares["first"] > 0 else ""
