"""Prompts and answers: reading them, turning them into token batches, greedy answers.

A prompt ends without a space (`Q: ...?\nA:`); its answer is stored without a leading space and is tokenised as one
space followed by the answer. B prompts, T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from msgspec import Meta
from torch import Tensor

from trainer.errors import DataError, UserError
from trainer.files import checked, parse_json, wrong
from trainer.language_model.chats import Chat, chat_prompt

T = TypeVar("T")
Text = Annotated[str, Meta(pattern=r"\S", extra=wrong("{field} is empty or no text: every prompt needs one"))]
SplitName = Literal["train", "validation", "heldout"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
Split = Annotated[SplitName, Meta(extra=wrong("split {value} is not train, validation or heldout"))]
FREE = ("template", "subject")  # fields that may be numbers, or null
MAY_BE_NULL = (*FREE, "answer", "concept")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file. `answer` and `concept` are "" where the line has none; `template` and `subject` are
    free text; `split` is train, validation (to choose on) or heldout (to report on)."""

    prompt: Text
    answer: Text = ""
    concept: Text = ""
    template: str = ""
    split: Split = "train"
    subject: str = ""


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank. UserError when a line is no JSON object."""
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                yield number, json_object(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number} is not UTF-8 JSON lines: {error}") from error


def json_object(line: str | bytes, where: str) -> dict[str, Any]:
    """The object of one line. UserError naming `where` when it is none."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not UTF-8 JSON lines: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def read_prompts(path: Path, tokenizer: Any = None) -> list[Prompt]:
    """All prompts of a JSONL file; with a tokenizer chats (`messages`) too, as its template writes them.

    UserError naming file and line when a prompt is missing, or a field impossible.
    """
    prompts = []
    for number, row in read_json_lines(path):
        known = {name: value for name, value in row.items() if name not in MAY_BE_NULL or value is not None}
        known |= {name: str(known[name]) for name in FREE if name in known}
        try:
            if tokenizer is not None and "messages" in known and "prompt" not in known:
                messages = checked({"messages": known.pop("messages")}, Chat).messages
                if not messages:
                    raise ValueError("messages is empty")
                known["prompt"] = chat_prompt(tokenizer, messages, f"{path}:{number}")
            prompts.append(checked(known, Prompt))
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from error
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def read_texts(path: Path, field: str) -> Iterator[str]:
    """Texts of a JSONL file, or of a folder that `datasets` saved or can load (its split "train").

    UserError when the source cannot be read or a row has no text under `field`.
    """
    rows = enumerate(open_data_set(path)) if path.is_dir() else read_json_lines(path)
    empty = True
    for number, row in rows:
        if not isinstance(row.get(field), str):
            raise UserError(f"{path}:{number}: no text field {field!r}; found {', '.join(sorted(row)) or 'none'}")
        empty = False
        yield row[field]
    if empty:
        raise UserError(f"{path} holds no texts")


def open_data_set(folder: Path) -> Any:
    """The data set (its split "train") that `datasets` saved in a folder or can load from it. UserError for neither."""
    import datasets

    try:
        saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
        data = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    except Exception as error:  # datasets raises a dozen unrelated types here
        raise UserError(f"cannot read the data set in {folder}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(data, dict):
        return data
    if "train" not in data:
        raise UserError(f"the data set in {folder} has no split 'train'; found {', '.join(data)}")
    return data["train"]


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of one space and `answer`, with the tokenizer's end token behind them if it has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokenizer(" " + answer.strip(), add_special_tokens=False)["input_ids"] + end


def encode_prompts(tokenizer: Any, prompts: Sequence[str], side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T] (int64) of `prompts`, padded on `side`. UserError on an empty prompt."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} of the batch is empty")
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side=side)
    return encoded["input_ids"], encoded["attention_mask"]


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of `size` items, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 64
) -> list[str]:
    """Greedy continuation of every prompt: the first line of what follows it, stripped.

    Batches are consecutive runs of `batch_size` prompts, padded on the left and in the given order.
    """
    answers: list[str] = []
    for part in batched(prompts, batch_size):
        ids, mask = encode_prompts(tokenizer, part, side="left")
        answers += greedy_answers(model, tokenizer, ids.to(model.device), mask.to(model.device), max_new_tokens)
    return answers


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, max_new_tokens: int, **more: Any
) -> list[str]:
    """As generate_answers, of one batch: ids and mask [B, T], padded on the left. more: of the model's `generate`."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]
