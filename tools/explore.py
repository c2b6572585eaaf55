"""Pages about every slot of a dictionary -> DIR/index.html, which a browser opens from the folder or from --serve

  alignsae explore --run runs/demo --shards data/demo/layer-01/heldout --out runs/demo/slots --model models/demo
  alignsae explore --run runs/demo --out runs/demo/slots --serve        look at pages that are there

Per slot: the rows that activate it most, with the tokens around them where the shards say which tokens rows are of,
a histogram, how often it is active, and the slots that write nearly the same; with --model the tokens that its decoder
row promotes and suppresses; for concept slots AUROC, false firings and misses on rows whose concepts are known. The
table of all slots can be searched and sorted. One pass over the rows; what is held grows with the slots, not with them.
"""

import argparse
import contextlib
import functools
import http.server
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tools.exploring.contexts import Contexts
from tools.exploring.pages import write
from trainer.analysis.language_model import block_part, load_language_model, read_json_lines
from trainer.analysis.lens import decoder_rows, logit_lens, nearest
from trainer.analysis.survey import BINS, Survey
from trainer.errors import DataError, UserError
from trainer.labels import widened
from trainer.pretrained import Trained, read_trained
from trainer.stream import DataConfig, Manifest
from trainer.stream.shards import from_stored
from trainer.stream.source import BlockSource

BATCH = 1024  # rows at a time: their codes of one bank stay near the processor
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae explore`."""
    parser.add_argument(
        "--run", dest="run_dir", type=Path, required=True, help="folder of a run, a checkpoint, an export or an import"
    )
    parser.add_argument("--shards", help="rows to look at: a shard folder or URL")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--model", help="the language model: texts of tokens, and what decoder rows promote")
    parser.add_argument("--prompts", type=Path, help="the JSONL that was extracted, for rows at the end of a prompt")
    parser.add_argument("--rows", type=int, help="look at the first N rows (default: all)")
    parser.add_argument("--contexts", type=int, default=8, help="rows shown of a slot (default: 8)")
    parser.add_argument("--window", type=int, default=8, help="tokens shown on either side (default: 8)")
    parser.add_argument("--serve", action="store_true", help="then serve the folder on this machine until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000, help="of --serve; 0: any that is free (default: 8000)")
    parser.add_argument("--device", default="cpu", help="device of dictionary and model (default: cpu)")


def run(args: argparse.Namespace) -> None:
    """Survey the rows, write the pages, and serve them."""
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


@torch.no_grad()
def slots(
    trained: Trained, survey: Survey, contexts: Contexts, model: Any
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Line of the table and details of every slot, in order."""
    rows = decoder_rows(trained.dictionary)
    # Every part of a block writes to the residual stream; of another module nobody knows.
    lens_fits = model is not None and block_part(trained.hook_point) is not None
    written = logit_lens(model, rows, 10) if lens_fits else None
    auroc, slot = survey.auroc().tolist(), 0
    with tqdm(total=trained.slots, desc="slots", unit="slot") as bar:
        for neighbours, cosines in nearest(rows, 8):
            lens = next(written) if written is not None else None
            for place in range(len(neighbours)):
                detail = _details(survey, contexts, slot)
                alive = [n for n, c in zip(neighbours[place].tolist(), cosines[place].tolist(), strict=True) if c > 0]
                detail["n"] = [[n, round(float(c), 3)] for n, c in zip(alive, cosines[place], strict=False)]
                if lens is not None and bool(rows[slot].any()):
                    detail["u"] = _tokens(contexts, lens.up[place], lens.up_logits[place])
                    detail["s"] = _tokens(contexts, lens.down[place], lens.down_logits[place])
                promoted = detail["u"][0][0] if "u" in detail else ""
                yield [*_line(trained, survey, contexts, slot, auroc), promoted], detail
                slot += 1
            bar.update(len(neighbours))


def _line(trained: Trained, survey: Survey, contexts: Contexts, slot: int, auroc: list[float]) -> list[Any]:
    fired = int(survey.fired[slot])
    own: list[Any] = [None, None, None]
    if slot < survey.concepts:
        positive, negative = int(survey.positives[slot]), int(survey.negatives[slot])
        own = [
            round(auroc[slot], 5) if positive and negative else None,
            _ratio(int(survey.false[slot]), negative),
            _ratio(int(survey.missed[slot]), positive),
        ]
    return [
        slot,
        trained.concepts[slot] if slot < len(trained.concepts) else None,
        fired / max(survey.rows, 1),
        round(float(survey.total[slot]) / fired, 4) if fired else 0.0,
        round(float(survey.most[slot]), 4),
        *own,
        contexts.peak(int(survey.top.row[slot, 0])),
    ]


def _details(survey: Survey, contexts: Contexts, slot: int) -> dict[str, Any]:
    detail: dict[str, Any] = {"i": slot}
    most = float(survey.most[slot])
    if most > 0:
        detail["h"] = survey.histogram.view(-1, BINS)[slot].tolist()
        detail["c"] = _shown(contexts, survey.top.value[slot], survey.top.row[slot], survey.top.window[slot], most)
    if slot < survey.concepts:
        counts = {"p": survey.positives, "n": survey.negatives, "f": survey.false, "m": survey.missed}
        detail["k"] = {name: int(count[slot]) for name, count in counts.items()}
        wrong, silent = survey.wrong, survey.silent
        detail["w"] = _shown(contexts, wrong.value[slot], wrong.row[slot], wrong.window[slot], most)
        detail["m"] = [contexts.show(row, 0.0, None, most) for row in silent.row[slot].tolist() if row >= 0]
    return detail


def _shown(contexts: Contexts, value: Tensor, row: Tensor, window: Tensor, most: float) -> list[dict[str, Any]]:
    return [contexts.show(int(r), float(v), w, most) for v, r, w in zip(value, row, window, strict=True) if int(r) >= 0]


def _tokens(contexts: Contexts, ids: Tensor, logits: Tensor) -> list[list[Any]]:
    return [[contexts.text(token), round(x, 3)] for token, x in zip(ids.tolist(), logits.tolist(), strict=True)]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def serve(folder: Path, port: int) -> None:
    """Serve a folder on loopback until Ctrl-C."""
    handler = functools.partial(_Handler, directory=str(folder))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be used ({error}); choose another, or 0 for any") from error
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the folder alone; a script that got in could load nothing from elsewhere."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", "default-src 'self'; style-src 'self' 'unsafe-inline'")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass
