"""Write residual activations of a causal language model as tar shards, several layers in one pass.

  alignsae extract --model M --prompts questions.jsonl --layers 1,2 --out data/demo
  alignsae extract --model M --texts corpus.jsonl --field text --layers 12 --out data/corpus

Layer L is the residual stream after the block with 0-based index L; it is written to OUT/layer-L/{train,heldout}, ready
for training and for stock webdataset.

Prompts: one row per prompt, the activation at its last token; row i of a split is prompt i of that split. Concepts are
the names in order of first appearance (or --concepts; prompts of other concepts become unlabelled rows). Texts: one
unlabelled row per token that is no padding. The held-out split carries the normalisation of the training split. Nothing
appears under its final name before it is complete.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.errors import UserError
from trainer.language_model import (
    Prompt,
    capture,
    check_layers,
    encode_prompts,
    hook_point,
    last_token,
    load_language_model,
    read_prompts,
    read_texts,
)
from trainer.stream import Manifest, ShardWriter
from trainer.stream.manifest import FILE_NAME as MANIFEST_NAME

SPLITS = ("train", "heldout")
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Prompts are sorted by length within runs of this many batches, which keeps padding small and memory bounded.
SORTED_RUN = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="save_pretrained folder or hub name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help="JSONL with prompt, answer, concept and optionally split")
    source.add_argument("--texts", type=Path, help="JSONL file or datasets folder of unlabelled text")
    parser.add_argument("--layers", required=True, help="comma-separated block indices, 0-based, or `all`")
    parser.add_argument("--out", required=True, type=Path, help="folder that receives layer-LL/{train,heldout}")
    parser.add_argument("--concepts", help="comma-separated concept names in slot order (default: as they appear)")
    parser.add_argument("--field", default="text", help="field of --texts that holds the text (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=512, help="longest window of a text, tokens (default: %(default)s)"
    )
    parser.add_argument("--skip-first", type=int, default=0, help="drop the first N tokens of each window of a text")
    parser.add_argument("--drop-special", action="store_true", help="drop special tokens of a text")
    parser.add_argument("--heldout", type=int, default=0, metavar="N", help="every N-th text is held out (0 = none)")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences per forward pass (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=COMPUTE, default="fp32", help="of the forward pass (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=["float16", "float32", "bfloat16"], default="float16", help="as stored")
    parser.add_argument("--rows-per-block", type=int, default=4096, help="rows per tar sample (default: %(default)s)")
    parser.add_argument("--shard-mb", type=int, default=512, help="MiB per tar file (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace finished splits in OUT")


@dataclass(frozen=True)
class Rows:
    """Rows of a stretch of the input: acts[layer] [n, D], labels [n] with -1 for none."""

    acts: dict[int, Tensor]
    concept: Tensor
    answer: Tensor


@dataclass
class Source:
    """What is extracted: label vocabularies, the number of units (prompts or texts) per split, and the rows of a split."""

    sizes: dict[str, int | None]
    rows: Callable[[str], Iterator[tuple[int, Rows]]]  # split -> (units done, rows)
    unit: str
    concepts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of up to `size` items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def parse_layers(text: str, model: Any) -> list[int]:
    """Sorted layer indices of `--layers`. UserError when one is no number or out of range."""
    if text == "all":
        return list(range(model.config.get_text_config(decoder=True).num_hidden_layers))
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--layers {text!r}: give comma-separated block indices such as 0,5 or `all`") from error
    check_layers(model, layers)
    return layers


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


def prompt_source(args: argparse.Namespace, model: Any, tokenizer: Any, layers: list[int]) -> Source:
    """One row per prompt, in prompt order."""
    prompts = read_prompts(args.prompts)
    by_split = {split: [p for p in prompts if p.split == split] for split in SPLITS}
    if not by_split["train"]:
        raise UserError(f"{args.prompts} has no prompt of split 'train', which the normalisation is computed from")
    concepts = choose_concepts(prompts, args.concepts)
    answers = list(dict.fromkeys(p.answer for p in prompts if p.concept in concepts))
    concept_index = {name: i for i, name in enumerate(concepts)}
    answer_index = {name: i for i, name in enumerate(answers)}

    def rows(split: str) -> Iterator[tuple[int, Rows]]:
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
                Rows(
                    {layer: torch.cat(parts[layer])[back] for layer in layers},
                    torch.tensor([concept_index.get(p.concept, -1) for p in run]),
                    torch.tensor([answer_index[p.answer] if k else -1 for p, k in zip(run, known, strict=True)]),
                ),
            )

    return Source({split: len(by_split[split]) for split in SPLITS}, rows, "prompt", concepts, answers)


def text_source(args: argparse.Namespace, model: Any, tokenizer: Any, layers: list[int]) -> Source:
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

    def rows(split: str) -> Iterator[tuple[int, Rows]]:
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
                Rows({layer: acts[layer][keep.to(args.device)].float().cpu() for layer in layers}, none, none),
            )

    return Source({"train": None, "heldout": None if args.heldout else 0}, rows, "text")


def write_split(
    args: argparse.Namespace, split: str, layers: list[int], source: Source, width: int
) -> dict[int, Manifest]:
    """Extract one split of every layer in one pass; the manifests that were written."""
    with ExitStack() as stack:
        writers = {}
        for layer in layers:
            folder = args.out / f"layer-{layer:02d}"
            train = Manifest.load(folder / "train") if split == "heldout" else None
            writers[layer] = stack.enter_context(
                ShardWriter(
                    folder / split,
                    split,
                    width=width,
                    dtype=args.dtype,
                    concepts=source.concepts,
                    answers=source.answers,
                    model=args.model,
                    hook_point=hook_point(layer),
                    rows_per_block=args.rows_per_block,
                    shard_bytes=args.shard_mb << 20,
                    normalisation=(train.mean, train.scale) if train else None,
                    overwrite=args.overwrite,
                )
            )
        with tqdm(total=source.sizes[split], desc=split, unit=source.unit) as bar:
            for done, rows in source.rows(split):
                for layer, writer in writers.items():
                    writer.write(rows.acts[layer], rows.concept, rows.answer)
                bar.update(done)
        return {layer: writer.close() for layer, writer in writers.items()}


def run(args: argparse.Namespace) -> int:
    for name in ("batch_size", "context", "rows_per_block", "shard_mb"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("skip_first", "heldout"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    model, tokenizer = load_language_model(args.model, args.device, COMPUTE[args.precision])
    layers = parse_layers(args.layers, model)
    source = (prompt_source if args.prompts else text_source)(args, model, tokenizer, layers)
    width = model.config.get_text_config(decoder=True).hidden_size
    splits = [split for split in SPLITS if source.sizes[split] != 0]
    for folder in [args.out / f"layer-{layer:02d}" / split for layer in layers for split in splits]:
        if (folder / MANIFEST_NAME).exists() and not args.overwrite:
            raise UserError(f"{folder} holds a finished extraction: choose another --out or pass --overwrite")
    for split in splits:
        for layer, manifest in write_split(args, split, layers, source, width).items():
            print(
                f"{args.out}/layer-{layer:02d}/{split}: {manifest.rows} rows of {manifest.width} in {len(manifest.shards)} shards"
            )
    return 0
