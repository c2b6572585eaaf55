"""Loss over the predicted tokens of a batch, and answer accuracy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tools.lm_training.batches import Batch, collate, encode_question
from trainer.language_model import Prompt


def predicted_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [N, V] at the N predicted positions alone: the vocabulary product is the dearest one of a small model."""
    mask = torch.nn.functional.pad(batch.predict, (0, 1))

    def select(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][mask].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        # All ones: padding is on the right, and without a mask the fast causal attention path is taken.
        out = model(input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), use_cache=False)
    finally:
        handle.remove()
    return out.logits.squeeze(0)


@torch.no_grad()
def known_answers(model: Any, tokenizer: Any, prompts: Sequence[Prompt], batch_size: int = 128) -> list[bool]:
    """Whether greedy decoding gives exactly the answer and the end token.

    Decided in one forward pass: greedy decoding reproduces a sequence if and only if every token of it is the argmax
    behind its true predecessors.
    """
    examples = [encode_question(tokenizer, p) for p in prompts]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    known = [False] * len(examples)
    for start in tqdm(range(0, len(order), batch_size), desc="answers", unit="batch"):
        rows = order[start : start + batch_size]
        batch = collate([examples[i] for i in rows], tokenizer.pad_token_id).to(model.device)
        right = torch.ones_like(batch.predict)
        right[batch.predict] = predicted_logits(model, batch).argmax(dim=-1) == batch.targets()
        for index, value in zip(rows, right.all(dim=1).tolist(), strict=True):
            known[index] = value
    return known


def answer_accuracy(prompts: Sequence[Prompt], known: Sequence[bool]) -> dict[str, Any]:
    """Share of known answers: overall, per split, relation and relation/template."""
    groups: dict[str, dict[str, list[bool]]] = {"split": {}, "relation": {}, "template": {}}
    for prompt, right in zip(prompts, known, strict=True):
        for kind, name in (
            ("split", prompt.split),
            ("relation", prompt.concept),
            ("template", f"{prompt.concept}/{prompt.template}"),
        ):
            groups[kind].setdefault(name, []).append(right)
    shares = {kind: {name: sum(v) / len(v) for name, v in named.items()} for kind, named in groups.items()}
    return {"answer_accuracy": sum(known) / len(known), "questions": len(known), **shares}
