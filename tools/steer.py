r"""Generate text with chosen slots of a dictionary changed, next to the text without.

  alignsae steer --run runs/demo --model models/demo --prompt 'Q: Where does Ada work?\nA:' employer=0 birth_city=1.5
  alignsae steer --run exported/demo --model models/demo --prompt 'Q: Where does Ada work?\nA:' --mode ablate employer
      --temperature 0.7 --chart --png steered.png

SLOT is a concept, or the number of any slot; a strength of 1 is the mean activation of the slot where its concept is
there, which the run, or its export, holds. --mode says what happens to the activation, --where at which tokens. Slots
that are not named keep their value, and so does what the dictionary does not reconstruct.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools import plots
from trainer.analysis.evaluation import concept_slot_means
from trainer.analysis.language_model import encode_prompts, load_language_model
from trainer.analysis.results import rows_of
from trainer.analysis.steering import MODES, WHERE, Steering, steer
from trainer.errors import UserError
from trainer.files import write_result
from trainer.pretrained import read_trained

BAR = 24  # characters of the longest bar of a chart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae steer`."""
    parser.add_argument("settings", nargs="+", metavar="SLOT=STRENGTH", help="with --mode ablate: SLOT")
    parser.add_argument(
        "--run", dest="run_dir", type=Path, required=True, help="folder of a run, a checkpoint, an export or an import"
    )
    parser.add_argument("--model", required=True, help="the language model that the activations came from")
    parser.add_argument(
        "--prompt", action="append", required=True, help=r"prompt, \n for a line break; may be given several times"
    )
    parser.add_argument("--mode", choices=tuple(MODES), default="set", help="how a slot is changed (default: set)")
    parser.add_argument("--where", choices=WHERE, default="prompt_end", help="at which tokens (default: prompt_end)")
    parser.add_argument("--read", action="append", default=[], metavar="SLOT", help="a further slot of the charts")
    parser.add_argument("--train", help="shards for the slots' mean activations, where the run holds none")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="tokens to generate (default: 24)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0: the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the likeliest (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from so many likeliest tokens; 0: all (default)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--chart", action="store_true", help="print the slots' activations token by token")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them, of the first prompt")
    parser.add_argument("--device", default="cpu", help="device of the model (default: cpu)")


def run(args: argparse.Namespace) -> None:
    """Print prompt, text before and text after for every prompt."""
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0 or args.max_new_tokens < 1:
        raise UserError("--temperature and --top-k must not be negative, --top-p in (0, 1], --max-new-tokens positive")
    trained = read_trained(args.run_dir)
    edits = _settings(args.settings, args.mode)
    for name in [*edits, *args.read]:
        trained.slot(name)
    if args.train:
        rows, _ = rows_of([args.train], trained.dictionary)
        means = concept_slot_means(trained.dictionary, rows).tolist()
        trained.facts.gains = {n: mean for n, mean in zip(trained.concepts, means, strict=True) if mean > 0}
    model, tokenizer = load_language_model(args.model, args.device)
    prompts = [p.replace("\\n", "\n") for p in args.prompt]
    longest = max(len(tokenizer(p)["input_ids"]) for p in prompts) + args.max_new_tokens
    limit = getattr(model.config, "max_position_embeddings", longest)
    if longest > limit:
        raise UserError(f"prompt and answer may take {longest} tokens, the model reads {limit}; lower --max-new-tokens")
    ids, mask = encode_prompts(tokenizer, prompts, side="left")
    before = generate(args, model, tokenizer, ids, mask)
    with steer(model, trained, edits, mode=args.mode, where=args.where, read=args.read) as steering:
        after = generate(args, model, tokenizer, ids, mask)
    for index, prompt in enumerate(prompts):
        texts = [
            tokenizer.decode(out[index, ids.shape[1] :], skip_special_tokens=True).strip() for out in (before, after)
        ]
        print(f"prompt: {prompt!r}\nbefore: {texts[0]}\nafter:  {texts[1]}\n")
        if args.chart:
            print(chart(_tokens(tokenizer, after[index]), steering, index), "\n")
    if args.png:
        image = io.BytesIO()
        plots.steering_plot(
            _tokens(tokenizer, after[0]), _of(steering, 0), len(ids[0]), first=int((~mask[0].bool()).sum())
        ).savefig(image, format="png")
        write_result(args.png, image.getvalue())
        print(f"written: {args.png}")


@torch.no_grad()
def generate(args: argparse.Namespace, model: Any, tokenizer: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Token ids [B, T + new] of the prompts ids, mask [B, T] and what follows them."""
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k} if args.temperature else {}
    torch.manual_seed(args.seed)
    return model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=args.max_new_tokens,
        do_sample=bool(sampling),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    ).cpu()


def chart(tokens: Sequence[str], steering: Steering, index: int) -> str:
    """A line for each token that the layer read: for each slot a bar of its activation, and what it was changed to."""
    found = _of(steering, index)
    most = {name: float(torch.stack(pair).nan_to_num().max().clamp_min(1e-9)) for name, pair in found.items()}
    lines = [f"{'token':<16}" + "".join(f"{name[: BAR + 18]:<{BAR + 20}}" for name in found)]
    for column, token in enumerate(tokens):
        cells = []
        for name, (read, new) in found.items():
            if column >= len(read) or bool(read[column].isnan()):
                break
            z, changed = float(read[column]), float(new[column])
            said = f"{z:.2f}" + (f" -> {changed:.2f}" if changed != z else "")
            bar = "█" * round(BAR * max(changed, 0.0) / most[name])
            cells.append(f"{f'{bar} {said}':<{BAR + 20}}")
        if cells:
            lines.append(f"{token[:15]!r:<16}"[:16] + "".join(cells).rstrip())
    return "\n".join(lines)


def _of(steering: Steering, index: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Slot -> (activations, what they were changed to), each [T], of one sequence."""
    return {name: (z[index].cpu(), steering.steered[name][index].cpu()) for name, z in steering.trace.items()}


def _tokens(tokenizer: Any, ids: Tensor) -> list[str]:
    return [tokenizer.decode([token]) for token in ids.tolist()]


def _settings(texts: Sequence[str], mode: str) -> Any:
    """What `steer` takes as edits."""
    if mode == "ablate":
        return list(texts)
    edits = {}
    for text in texts:
        name, separator, value = text.rpartition("=")
        try:
            if not separator:
                raise ValueError
            edits[name] = float(value)
        except ValueError:
            raise UserError(f"{text!r}: {value!r} is no number; write {name or value}=1.5 for example") from None
    return edits
