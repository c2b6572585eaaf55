"""Labelled rows of a JSONL file: what a model reads, and which of its tokens carry which concepts.

| a row has | labelled |
|---|---|
| `prompt` | its last token |
| `messages`, which the tokenizer's chat template turns into text | the last token |
| `text` with `spans: [{start, end, concept}]` in characters | the tokens that overlap a span |
| `text` without spans | all its tokens |

`concept` (a name) or `concepts` (a list; an empty one says that the row has none of the concepts) label the row;
without either it is unknown. `answer` and `split` are optional.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from trainer.errors import UserError
from trainer.files import checked, whole, wrong
from trainer.language_model.chats import Message
from trainer.language_model.prompts import Split, Text

Character = Annotated[int, whole(0, 1 << 62)]
Name = Annotated[str, Meta(pattern=r"\S", extra=wrong("{field} is empty or no text: a concept needs a name"))]
BODIES = ("prompt", "messages", "text")


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text."""

    start: Character
    end: Character
    concept: Name


@dataclass(frozen=True)
class Example:
    """One row. Exactly one of `prompt`, `messages` and `text` is set; `concepts` is None where nothing is known."""

    prompt: Text = ""
    messages: tuple[Message, ...] = ()
    text: str = ""
    answer: Text = ""
    concept: Name = ""
    concepts: tuple[Name, ...] | None = None
    spans: tuple[Span, ...] | None = None
    split: Split | None = None

    @property
    def names(self) -> tuple[str, ...] | None:
        """Concepts of the row as a whole: () for none of them, None where that is unknown."""
        return (self.concept,) if self.concept else self.concepts


def read_example(row: dict[str, Any], where: str) -> Example:
    """A row as an Example; fields that belong to none are passed over. UserError, one line, naming `where`."""
    known = {name: value for name, value in row.items() if value is not None}
    body = next((name for name in BODIES if name in known), None)
    if body is None:
        raise UserError(
            f"{where}: no field 'prompt', 'text' or 'messages'; found {', '.join(sorted(map(str, row))) or 'none'}"
        )
    known = {name: value for name, value in known.items() if name == body or name not in BODIES}
    try:
        example = checked(known, Example)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if problem := _problem(example, body):
        raise UserError(f"{where}: {problem}")
    return example


def _problem(example: Example, body: str) -> str:
    """What cannot be, in one line; "" for nothing."""
    if not (example.prompt or example.messages or example.text.strip()):
        return f"{body} is empty"
    if example.concept and example.concepts is not None:
        return "concept and concepts exclude each other; list all of them in concepts"
    names = example.names or ()
    if len(set(names)) < len(names):
        return "concepts lists a name twice"
    if example.spans is None:
        return ""
    if body != "text":
        return f"spans belong to a text, not to {body}"
    if example.names is not None:
        return "spans and concepts of the whole text exclude each other; add a span over the whole text"
    for span in example.spans:
        if not span.start < span.end <= len(example.text):
            return (
                f"span {span.start}..{span.end} of {span.concept!r:.60} is empty or ends outside the text of "
                f"{len(example.text)} characters"
            )
    return ""
