"""What `alignsae finetune-lm` does; its arguments and its help are in tools/parsers."""

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from tools.lm_training import checkpoint
from tools.lm_training.batches import Example, Shuffled, encode_question, encode_text
from tools.lm_training.models import build_model, build_tokenizer
from tools.lm_training.score import answer_accuracy, known_answers, predicted_logits
from trainer.errors import UserError
from trainer.files import allow_as_umask, write_json
from trainer.language_model import Prompt, load_language_model, read_prompts, read_texts

# What a checkpoint must agree on to be continued.
SETTINGS = (
    *("model", "from_scratch", "layers", "width", "heads", "vocabulary", "context", "seed", "precision"),
    *("questions", "texts", "field", "templates", "questions_per_step", "texts_per_step", "text_weight"),
    *("steps", "lr", "final_lr", "warmup", "weight_decay", "beta2", "eps", "clip"),
)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to --lr, then a cosine to --final-lr x --lr at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (args.final_lr + (1 - args.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Any, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices but neither biases nor norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), eps=args.eps, fused=True)


def train(
    model: Any, optimizer: Any, sources: list[tuple[Shuffled, float]], args: argparse.Namespace, folder: Path
) -> None:
    """The visible loop, from the last checkpoint in `folder` to --steps. A batch is a function of the step alone."""
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    settings["content of the data"] = " ".join(batches.digest for batches, _ in sources)
    first = checkpoint.load(folder, model, optimizer, settings)
    model.train()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="language model", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        torch.manual_seed((args.seed << 32) + step)  # dropout of a fine-tuned model, the same after a resume
        losses = []
        for batches, weight in sources:
            batch = batches[step].to(args.device)
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16"):
                logits = predicted_logits(model, batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets())
            (weight * loss).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step + 1 == args.steps:
            bar.set_postfix({name: f"{x.item():.3f}" for name, x in zip(("questions", "texts"), losses, strict=False)})
            if not all(torch.isfinite(x) for x in losses):
                raise UserError(f"the loss is not finite at step {step}: try a smaller --lr than {args.lr}")
        if args.checkpoint_every and (step + 1) % args.checkpoint_every == 0 and step + 1 < args.steps:
            checkpoint.save(folder, model, optimizer, step + 1, settings)


def examples(
    tokenizer: Any, prompts: list[Prompt], texts: list[str], context: int
) -> tuple[list[Example], list[Example]]:
    """Token sequences of questions and texts. UserError when a question does not fit into `context` tokens."""
    asked = [encode_question(tokenizer, p) for p in prompts]
    longest = max(range(len(asked)), key=lambda i: len(asked[i].ids))
    if len(asked[longest].ids) > context:
        raise UserError(
            f"the question about {prompts[longest].subject or prompts[longest].prompt!r} has {len(asked[longest].ids)} "
            f"tokens, more than --context {context}"
        )
    return asked, [window for text in texts for window in encode_text(tokenizer, text, context)]


def check(args: argparse.Namespace) -> None:
    """Fill in what --data stands for, and refuse what cannot work."""
    if args.data:
        args.questions = args.questions or args.data / "questions.jsonl"
        args.texts = args.texts or args.data / "biographies.jsonl"
    if not args.questions:
        raise UserError("give --data FOLDER (output of `alignsae biographies`) or --questions FILE")
    for name in ("steps", "questions_per_step", "texts_per_step", "context", "layers", "width", "heads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.out.exists():
        raise UserError(f"{args.out} exists already: choose another --out or delete it")


def run(args: argparse.Namespace) -> int:
    check(args)
    started = time.monotonic()
    prompts = read_prompts(args.questions)
    if unanswered := next((p.prompt for p in prompts if not p.answer), None):
        raise UserError(f"{args.questions}: {unanswered!r:.80} has no answer to learn")
    texts = list(read_texts(args.texts, args.field)) if args.texts else []
    learned = [p for p in prompts if args.templates == "all" or p.split == "train"]
    torch.manual_seed(args.seed)
    if args.model:
        model, tokenizer = load_language_model(args.model, args.device)
        model.requires_grad_(True)
    else:
        tokenizer = build_tokenizer([f"{p.prompt} {p.answer}" for p in learned] + texts, args.vocabulary)
        model = build_model(args.from_scratch, tokenizer, args.layers, args.width, args.heads, args.context).to(
            args.device
        )
    if args.precision == "bf16" and torch.device(args.device).type == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel's backward pass is dearer there than all products
    asked, told = examples(tokenizer, learned, texts, args.context)
    pad = tokenizer.pad_token_id
    sources = [(Shuffled(asked, args.questions_per_step, pad, args.seed), 1.0)]
    if told:
        sources.append((Shuffled(told, args.texts_per_step, pad, args.seed + 1), args.text_weight))
    folder = args.out.with_name(f"{args.out.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        train(model, make_optimizer(model, args), sources, args, folder)
        model.eval()
        report = answer_accuracy(prompts, known_answers(model, tokenizer, prompts))
        report["parameters"] = sum(p.numel() for p in model.parameters())
        report["settings"] = {name: str(getattr(args, name)) for name in SETTINGS}
        report["seconds"] = round(time.monotonic() - started, 1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "lm_report.json", report)
        shutil.rmtree(folder / checkpoint.NAME, ignore_errors=True)
        allow_as_umask(folder)
        folder.rename(args.out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
    shares = ", ".join(f"{name} {share:.3f}" for name, share in report["relation"].items())
    print(f"{args.out}: answer accuracy {report['answer_accuracy']:.4f} ({shares}) in {report['seconds']} s")
    return 0
