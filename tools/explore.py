"""What `alignsae explore` does; its arguments and its help are in tools/parsers."""

import argparse
import contextlib
import functools
import http.server
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tools.exploring.contexts import Contexts
from tools.exploring.pages import write
from tools.exploring.slots import slots
from trainer.analysis.survey import Survey
from trainer.errors import DataError, UserError
from trainer.labels import widened
from trainer.language_model import load_language_model, read_json_lines
from trainer.pretrained import Trained, read_trained
from trainer.run_folder import RunFolder
from trainer.stream import DataConfig, Manifest
from trainer.stream.shards import from_stored
from trainer.stream.source import BlockSource

BATCH = 1024  # rows at a time: their codes of one bank stay near the processor
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
COLUMNS = [
    (0, "slot", "number of the slot"),
    (1, "concept", "the concept that the slot is bound to"),
    (2, "active", "share of the rows on which it is active"),
    (3, "mean", "mean activation where it is active"),
    (4, "largest", "largest activation"),
    (5, "AUROC", "how well the activation tells rows with the concept from rows without it"),
    (6, "false", "share of the rows without the concept on which it is active"),
    (7, "missed", "share of the rows with the concept on which it is silent"),
    (8, "peak token", "token of the row with the largest activation"),
    (9, "promotes", "token whose logit its decoder row raises most"),
]


def run(args: argparse.Namespace) -> None:
    """Survey the rows, write the pages, and serve them."""
    args.out = args.out or RunFolder.around(args.run_dir).slot_pages
    page = args.out / "index.html"
    if args.shards is None and not (args.serve and page.is_file()):
        raise UserError(f"{page} is not there to be served; give the rows to look at with --shards")
    if args.shards is not None:
        if args.out.exists():
            raise UserError(
                f"{args.out} already exists; name a folder that does not, or leave --shards out to serve it"
            )
        if args.contexts < 1 or args.window < 0 or (args.rows is not None and args.rows < 1):
            raise UserError("--contexts and --rows must be at least 1, --window not negative")
        explore(args)
    if args.serve:
        serve(args.out, args.port)


def explore(args: argparse.Namespace) -> None:
    """Write the pages under a temporary name and rename."""
    trained = read_trained(args.run_dir).to(args.device)
    manifest = Manifest.load(args.shards)
    if manifest.width != trained.width:
        raise DataError(f"{args.shards}: rows of width {manifest.width}, but the dictionary has {trained.width}")
    names = list(manifest.concepts) if list(manifest.concepts) == trained.concepts else []
    model, tokenizer = load_language_model(args.model, args.device) if args.model else (None, None)
    survey = Survey(trained.dictionary, len(names), args.contexts, args.window)
    origins, labels = look(survey, args.shards, manifest, args.rows)
    contexts = Contexts(
        origins,
        labels,
        list(manifest.concepts),
        None if tokenizer is None else lambda token: tokenizer.decode([token]),
        [prompt_of(row) for _, row in read_json_lines(args.prompts)] if args.prompts else [],
    )
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        parts = write(partial, about(args, trained, manifest, survey, names), slots(trained, survey, contexts, model))
        partial.rename(args.out)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error}; free some space or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"written: {args.out / 'index.html'} ({trained.slots} slots, {survey.rows} rows, {sum(parts.values())} parts)"
    )


def prompt_of(row: dict[str, Any]) -> str:
    """What the model read of a row of --prompts."""
    turns = row.get("messages")
    if isinstance(turns, list):
        return "\n".join(str(turn.get("content", "")) for turn in turns if isinstance(turn, dict))
    return str(row.get("prompt") or row.get("text") or "")


def look(survey: Survey, shards: str, manifest: Manifest, limit: int | None) -> tuple[np.ndarray | None, np.ndarray]:
    """Show the rows to the survey; where they come from [N, 3], None where some block does not say, and their labels
    [N, M]."""
    total = min(manifest.rows, limit or manifest.rows)
    origins: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    seen, known = 0, True
    source = BlockSource(DataConfig(shards=shards, max_norm=0.0), manifest)
    with closing(source), tqdm(total=total, desc="rows", unit="row") as bar:
        for index in range(len(manifest.blocks)):
            if seen == total:
                break
            block = source.rows(index)
            count = min(len(block.acts), total - seen)
            origin = source.origin(index) if known else None
            known = origin is not None
            if origin is not None:
                origins.append(origin[:count].copy())
            labels.append(widened(block.concept[:count], manifest.concepts_per_row).copy())
            acts = from_stored(block.acts[:count].copy(), manifest.dtype)  # torch takes no array that cannot be written
            valid = torch.from_numpy(block.valid[:count])
            for part in torch.arange(count).split(BATCH):
                survey.add(acts[part], torch.from_numpy(labels[-1])[part], valid[part])
                bar.update(len(part))
            seen += count
    return np.concatenate(origins) if known else None, np.concatenate(labels)


def about(
    args: argparse.Namespace, trained: Trained, manifest: Manifest, survey: Survey, names: list[str]
) -> dict[str, Any]:
    """The head of the page."""
    silent = int((survey.fired == 0).sum())
    l0 = float(survey.fired.sum()) / max(survey.rows, 1)
    notes = []
    if silent:
        notes.append(f"{silent:,} slots ({silent / trained.slots:.1%}) are active on none of these rows.")
    if trained.concepts and not names:
        notes.append("The shards are of other concepts than the dictionary: no AUROC, false firings and misses.")
    return {
        "name": args.run_dir.resolve().name,
        "rows": f"{survey.rows:,}",
        "columns": COLUMNS,
        "facts": [
            f"{trained.slots:,} slots, {len(trained.concepts)} of them bound to concepts",
            f"{trained.model or 'unknown model'}, {trained.hook_point or 'unknown hook point'}",
            f"{survey.rows:,} rows, L0 {l0:.1f}",
            f"data {manifest.digest[:12]}",
        ],
        "notes": notes,
    }


def serve(folder: Path, port: int) -> None:
    """Serve a folder on loopback until Ctrl-C."""
    handler = functools.partial(PageHandler, directory=str(folder))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be used ({error}); choose another, or 0 for any") from error
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


class PageHandler(http.server.SimpleHTTPRequestHandler):
    """Files of the folder alone; a script that got in could load nothing from elsewhere."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass
