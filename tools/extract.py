"""Write residual activations of a causal language model as tar shards, several layers in one pass.

  alignsae extract --model M --prompts questions.jsonl --layers 1,2 --out data/demo
  alignsae extract --model M --texts corpus.jsonl --field text --layers 12 --out data/corpus

Layer L is the residual stream after the block with 0-based index L; it is written to OUT/layer-L/{train,heldout}, ready
for training and for stock webdataset.

Prompts: one row per prompt, the activation at its last token; row i of a split is prompt i of that split. Concepts are
the names in order of first appearance (or --concepts; prompts of other concepts become unlabelled rows). Texts: one
unlabelled row per token that is no padding. The held-out split carries the normalisation of the training split. Nothing
appears under its final name before it is complete; after an interruption the same command keeps the finished splits.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tools.extraction.identity import identity
from tools.extraction.sources import SPLITS, Source, prompt_source, text_source
from trainer.analysis.language_model import check_layers, hook_point, load_language_model
from trainer.errors import UserError
from trainer.stream import Manifest, ShardSpec, ShardWriter
from trainer.stream.manifest import FILE_NAME as MANIFEST_NAME

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def write_split(
    args: argparse.Namespace, split: str, layers: list[int], source: Source, width: int, made_from: dict[str, Any]
) -> None:
    """Extract one split of every layer in one pass."""
    with ExitStack() as stack:
        writers = {}
        for layer in layers:
            train = Manifest.load(split_folder(args, layer, "train")) if split == "heldout" else None
            spec = ShardSpec(
                width=width,
                dtype=args.dtype,
                concepts=source.concepts,
                answers=source.answers,
                model=args.model,
                hook_point=hook_point(layer),
                extra=made_from,
            )
            writers[layer] = stack.enter_context(
                ShardWriter(
                    split_folder(args, layer, split),
                    split,
                    spec,
                    rows_per_block=args.rows_per_block,
                    shard_bytes=args.shard_mb << 20,
                    normalisation=(train.mean, train.scale) if train else None,
                    overwrite=args.overwrite,
                )
            )
        with tqdm(total=source.sizes[split], desc=split, unit=source.item) as bar:
            for done, rows in source.rows(split, layers):
                for layer, writer in writers.items():
                    writer.write(rows.acts[layer], rows.concept, rows.answer)
                bar.update(done)


def split_folder(args: argparse.Namespace, layer: int, split: str) -> Path:
    return args.out / f"layer-{layer:02d}" / split


def finished(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether `folder` holds this very extraction. UserError when it holds another one."""
    if not (folder / MANIFEST_NAME).exists():
        return False
    found = Manifest.load(folder).extra
    different = [name for name, value in made_from.items() if found.get(name) != value]
    if different:
        raise UserError(
            f"{folder} holds an extraction with another {', '.join(different)}: "
            "choose another --out or pass --overwrite"
        )
    return True


def run(args: argparse.Namespace) -> int:
    for name in ("batch_size", "context", "rows_per_block", "shard_mb"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("skip_first", "heldout"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    model, tokenizer = load_language_model(args.model, args.device, COMPUTE[args.precision])
    layers = parse_layers(args.layers, model)
    source = (prompt_source if args.prompts else text_source)(args, model, tokenizer)
    width = model.config.get_text_config(decoder=True).hidden_size
    made_from = identity(args, model)
    splits = [split for split in SPLITS if source.sizes[split] != 0]
    missing = {
        split: [n for n in layers if args.overwrite or not finished(split_folder(args, n, split), made_from)]
        for split in splits
    }
    for split in splits:
        if missing[split]:
            write_split(args, split, missing[split], source, width, made_from)
        for layer in layers:
            folder = split_folder(args, layer, split)
            rows = Manifest.load(folder).rows
            kept = "" if layer in missing[split] else " (finished before, kept)"
            print(f"{folder}: {rows} rows of width {width}{kept}")
    return 0
