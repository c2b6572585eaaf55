"""What `alignsae steer` does; its arguments and its help are in tools/parsers."""

import argparse
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tools import plots
from tools.timing.steering import overhead
from trainer.analysis.evaluation import concept_slot_means
from trainer.analysis.results import rows_of
from trainer.analysis.steering import Steering, steer
from trainer.errors import UserError
from trainer.files import write_result
from trainer.language_model import encode_prompts, load_language_model
from trainer.pretrained import read_trained

BAR = 24  # characters of the longest bar of a chart


def run(args: argparse.Namespace) -> None:
    """Print prompt, text before and text after for every prompt."""
    if args.time is not None and args.time < 1:
        raise UserError("--time must be positive")
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
    if args.time:
        print(timed(args, model, tokenizer, (ids, mask), partial(steer, model, trained, edits)))
    if args.png:
        image = io.BytesIO()
        plots.steering_plot(
            _tokens(tokenizer, after[0]), _of(steering, 0), len(ids[0]), first=int((~mask[0].bool()).sum())
        ).savefig(image, format="png")
        write_result(args.png, image.getvalue())
        print(f"written: {args.png}")


def timed(
    args: argparse.Namespace, model: Any, tokenizer: Any, prompts: tuple[Tensor, Tensor], steering: Callable[..., Any]
) -> str:
    """What `--time` prints."""

    def plain() -> None:
        generate(args, model, tokenizer, *prompts, least=args.max_new_tokens)

    def steered() -> None:
        with steering(mode=args.mode, where=args.where, read=args.read):
            plain()

    return overhead(plain, steered, args.max_new_tokens, args.time, args.device)


@torch.no_grad()
def generate(args: argparse.Namespace, model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, least: int = 0) -> Tensor:
    """Token ids [B, T + new] of the prompts ids, mask [B, T] and what follows them, at least so many tokens."""
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k} if args.temperature else {}
    torch.manual_seed(args.seed)
    return model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=least,
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
