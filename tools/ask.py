"""What `alignsae ask` does; its arguments and its help are in tools/parsers."""

import argparse
import json
from collections.abc import Sequence

from tqdm import tqdm

from trainer.errors import UserError
from trainer.files import write_result
from trainer.language_model import (
    RULES,
    Prompt,
    batched,
    encode_answer,
    generate_answers,
    load_language_model,
    load_tokenizer,
    matcher,
    read_json_lines,
    read_prompts,
    suggested_rule,
)


def run(args: argparse.Namespace) -> None:
    """Ask, print the table, write the answered prompts."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    lines = [row for _, row in read_json_lines(args.prompts)]
    asked = [
        (p, row)
        for p, row in zip(read_prompts(args.prompts, load_tokenizer(args.model)), lines, strict=True)
        if p.answer
    ]
    if not asked:
        raise UserError(f"{args.prompts}: no prompt has an answer to compare with")
    prompts = [prompt for prompt, _ in asked]
    model, tokenizer = load_language_model(args.model, args.device)
    longest = max(len(encode_answer(tokenizer, prompt.answer)) for prompt in prompts)
    texts: list[str] = []
    with tqdm(total=len(prompts), desc="asking", unit="prompt") as bar:
        for batch in batched([prompt.prompt for prompt in prompts], args.batch_size):
            texts += generate_answers(model, tokenizer, batch, longest, args.batch_size)
            bar.update(len(batch))
    answered = {}
    for rule in RULES:
        match = matcher(rule, tokenizer)
        answered[rule] = [match(text, prompt.answer) for text, prompt in zip(texts, prompts, strict=True)]
    shares = {rule: sum(known) / len(known) for rule, known in answered.items()}
    print(table(prompts, answered))
    suggested = suggested_rule(shares)
    if suggested:
        print(f"suggested: --match {suggested} ({RULES[suggested]}), {shares[suggested]:.1%} of {len(prompts)} prompts")
    else:
        print("the model answers none of these prompts: write them so that the answer is what comes next")
    for prompt, text in list(zip(prompts, texts, strict=True))[:3]:
        print(f"  {prompt.prompt!r:.60} -> {text!r:.60}, expected {prompt.answer!r:.60}")
    if args.out is None:
        return
    rule = args.match or suggested
    if not rule or not any(answered[rule]):
        by = f" by --match {rule}" if rule else ""
        raise UserError(f"{args.out} is not written: the model answers none of {args.prompts}{by}")
    known = [row for (_, row), right in zip(asked, answered[rule], strict=True) if right]
    write_result(args.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in known))
    print(f"written: {args.out} ({len(known)} prompts that are answered by --match {rule})")


def table(prompts: Sequence[Prompt], answered: dict[str, list[bool]]) -> str:
    """Shares answered by each rule: over all, per concept, and per concept and template."""
    groups: dict[str, list[int]] = {"all": list(range(len(prompts)))}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.concept or "(no concept)", []).append(index)
        if prompt.template:
            groups.setdefault(f"{prompt.concept} / {prompt.template}", []).append(index)
    wide = max(map(len, groups))
    lines = [" ".join([f"{'':<{wide}} {'prompts':>7}", *(f"{rule:>7}" for rule in answered)])]
    for name in ["all", *sorted(groups.keys() - {"all"})]:
        members = groups[name]
        shares = (sum(known[i] for i in members) / len(members) for known in answered.values())
        lines.append(" ".join([f"{name:<{wide}} {len(members):>7}", *(f"{share:>7.3f}" for share in shares)]))
    return "\n".join(lines)
