"""What `alignsae extract` reads: prompts or texts, turned into rows of activations and labels."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trainer.analysis.language_model import Prompt, capture, encode_prompts, last_token, read_prompts, read_texts
from trainer.errors import UserError

SPLITS = ("train", "heldout")
# Prompts are sorted by length within runs of this many batches, which keeps padding small and memory bounded.
SORTED_RUN = 32


@dataclass(frozen=True)
class LabelledRows:
    """Rows of a stretch of the input: acts[layer] [n, D], labels [n] with -1 for none."""

    acts: dict[int, Tensor]
    concept: Tensor
    answer: Tensor


@dataclass
class Source:
    """What is extracted: label vocabularies, the number of prompts or texts per split, and the rows of a split."""

    sizes: dict[str, int | None]
    rows: Callable[[str, Sequence[int]], Iterator[tuple[int, LabelledRows]]]  # (split, layers) -> (items done, rows)
    item: str  # prompt or text
    concepts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of up to `size` items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def choose_concepts(prompts: Sequence[Prompt], names: str | None) -> list[str]:
    """Concept names in slot order. UserError when --concepts names one that no prompt has, or one twice."""
    found = list(dict.fromkeys(p.concept for p in prompts))
    if names is None:
        return found
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in found:
            near = get_close_matches(name, found, n=1, cutoff=0) or [""]
            raise UserError(f"--concepts: no prompt has concept {name!r}; the nearest one is {near[0]!r}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--concepts {names}: a name occurs twice")
    return chosen


def check_lengths(mask: Tensor, model: Any, what: str) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and mask.shape[1] > limit:
        raise UserError(f"{what} has {mask.shape[1]} tokens; the model takes {limit}")


def prompt_source(args: argparse.Namespace, model: Any, tokenizer: Any) -> Source:
    """One row per prompt, in prompt order."""
    prompts = read_prompts(args.prompts)
    by_split = {split: [p for p in prompts if p.split == split] for split in SPLITS}
    if not by_split["train"]:
        raise UserError(f"{args.prompts} has no prompt of split 'train', which the normalisation is computed from")
    concepts = choose_concepts(prompts, args.concepts)
    answers = list(dict.fromkeys(p.answer for p in prompts if p.concept in concepts))
    concept_index = {name: i for i, name in enumerate(concepts)}
    answer_index = {name: i for i, name in enumerate(answers)}

    def rows(split: str, layers: Sequence[int]) -> Iterator[tuple[int, LabelledRows]]:
        for run in chunks(by_split[split], args.batch_size * SORTED_RUN):
            order = sorted(range(len(run)), key=lambda i: len(run[i].prompt))
            parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            for batch in chunks(order, args.batch_size):
                ids, mask = encode_prompts(tokenizer, [run[i].prompt for i in batch])
                check_lengths(mask, model, f"a prompt of {args.prompts}")
                acts = capture(model, ids.to(args.device), mask.to(args.device), layers)
                last = last_token(mask)
                for layer in layers:
                    parts[layer].append(acts[layer][torch.arange(len(batch)), last].float().cpu())
            back = torch.tensor(order).argsort()
            known = [p.concept in concept_index for p in run]
            yield (
                len(run),
                LabelledRows(
                    {layer: torch.cat(parts[layer])[back] for layer in layers},
                    torch.tensor([concept_index.get(p.concept, -1) for p in run]),
                    torch.tensor([answer_index[p.answer] if k else -1 for p, k in zip(run, known, strict=True)]),
                ),
            )

    return Source({split: len(by_split[split]) for split in SPLITS}, rows, "prompt", concepts, answers)


def text_source(args: argparse.Namespace, model: Any, tokenizer: Any) -> Source:
    """One unlabelled row per token, in text order."""
    special = torch.tensor(sorted(tokenizer.all_special_ids))

    def windows(split: str) -> Iterator[tuple[list[int], int]]:
        """Token ids of a window, and 1 with the last window of a text."""
        chosen = (
            text
            for index, text in enumerate(read_texts(args.texts, args.field))
            if (args.heldout > 0 and index % args.heldout == args.heldout - 1) == (split == "heldout")
        )
        for run in chunks(chosen, args.batch_size):  # together, so that the tokenizer can use several threads
            for ids in tokenizer(run)["input_ids"]:
                cut = [ids[i : i + args.context] for i in range(0, len(ids), args.context)]
                yield from ((window, int(window is cut[-1])) for window in cut)

    def rows(split: str, layers: Sequence[int]) -> Iterator[tuple[int, LabelledRows]]:
        for batch in chunks(windows(split), args.batch_size):
            padded = tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, padding_side="right", return_tensors="pt")
            ids, mask = padded["input_ids"], padded["attention_mask"]
            check_lengths(mask, model, "a window of --context")
            acts = capture(model, ids.to(args.device), mask.to(args.device), layers)
            keep = mask.bool()
            keep[:, : args.skip_first] = False
            if args.drop_special:
                keep &= ~torch.isin(ids, special)
            none = torch.full((int(keep.sum()),), -1)
            yield (
                sum(done for _, done in batch),
                LabelledRows({layer: acts[layer][keep.to(args.device)].float().cpu() for layer in layers}, none, none),
            )

    return Source({"train": None, "heldout": None if args.heldout else 0}, rows, "text")
