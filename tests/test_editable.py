"""Prompts that are read once: what is computed equals reading each prompt whole, alone, for every edit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig

from tests.support.language_model import WIDTH, tiny_tokenizer, words
from tools.lm_training.models import build_model
from trainer.errors import UserError
from trainer.language_model import EditableModel, encode_answer, module_at

LAYERS, NEW = 3, 4
# One prompt of one token, others longer than the window of the model that has one.
PROMPTS = ["Q where ann", "Q", "where bob which city Q where dan", "which cem"]
ANSWERS = ["rome", "acme law", "bio bio rome", "zeta"]


def random_model(kind: str) -> Any:
    """A small frozen model, far from its start, where prompts hardly matter."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": len(words()), "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    if kind == "window":
        heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
        config: Any = MistralConfig(**common, **heads, sliding_window=3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    elif kind == "recurrent":
        model = AutoModelForCausalLM.from_config(MambaConfig(**common, state_size=4))
    else:
        model = build_model(kind, tiny_tokenizer(), layers=LAYERS, width=WIDTH, heads=2, context=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter) * (parameter.ndim == 2))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox", "window", "recurrent"])
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(request.param)


def whole(model: Any, layer: int, prompt: str, behind: list[int], push: Tensor) -> Tensor:
    """Logits [T + len(behind), V] of one prompt, unpadded, read in one pass with `push` added at its last token."""
    ids = tiny_tokenizer()(prompt)["input_ids"]

    def after(module: Any, inputs: Any, output: Any) -> Any:
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[0, len(ids) - 1] += push
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = module_at(model, layer).register_forward_hook(after)
    logits: Tensor = model(input_ids=torch.tensor([ids + behind]), use_cache=False).logits[0]
    handle.remove()
    return logits


def pushes(seed: int = 1) -> Tensor:
    return 20 * torch.randn(len(PROMPTS), WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_answers_are_those_of_whole_prompts(model: Any, layer: int) -> None:
    editable = EditableModel(model, tiny_tokenizer(), layer, batch_size=3)
    found = []
    for seed in (1, 2, 1):
        push = pushes(seed)
        texts: list[str] = []
        for part, added in zip(editable.batches(PROMPTS), push.split(3), strict=True):
            texts += editable.read(part).answers(added.__add__, NEW)
        for prompt, text, p in zip(PROMPTS, texts, push, strict=True):
            said: list[int] = []
            while len(said) < NEW:
                said.append(int(whole(model, layer, prompt, said, p)[-1].argmax()))
            assert text == str(tiny_tokenizer().decode(said, skip_special_tokens=True)).strip()
        found.append(texts)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_losses_and_gradients_are_those_of_whole_prompts(model: Any, layer: int) -> None:
    tokenizer, push = tiny_tokenizer(), pushes().requires_grad_()
    read = EditableModel(model, tokenizer, layer).read(PROMPTS)
    total, tokens = read.cross_entropy(ANSWERS, lambda h: h + push)
    gradient = torch.autograd.grad(total, push)[0]
    expected, count = torch.zeros(()), 0
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        told = encode_answer(tokenizer, answer)
        logits = whole(model, layer, prompt, told[:-1], push[row])[-len(told) :]
        expected, count = expected + cross_entropy(logits, torch.tensor(told), reduction="sum"), count + len(told)
        torch.testing.assert_close(read.logits(lambda h: h + push)[row, 0], logits[0], atol=1e-4, rtol=1e-4)
    assert tokens == count
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, push)[0], atol=1e-4, rtol=1e-4)
    assert gradient.abs().max() > 1e-3


def test_ends_are_what_an_edit_is_given(model: Any) -> None:
    editable = EditableModel(model, tiny_tokenizer(), 1, batch_size=3)
    ends = editable.ends(PROMPTS)
    seen: list[Tensor] = []

    def edit(h: Tensor) -> Tensor:
        seen.append(h.clone())
        return h

    for part in editable.batches(PROMPTS):
        editable.read(part).answers(edit, 1)
    torch.testing.assert_close(torch.cat(seen), ends, atol=1e-5, rtol=1e-5)
    plain = editable.answers(PROMPTS, NEW)
    alone = EditableModel(model, tiny_tokenizer(), 1, batch_size=1)
    assert alone.answers(PROMPTS, NEW) == plain
    torch.testing.assert_close(alone.ends(PROMPTS), ends, atol=1e-4, rtol=1e-4)


def test_the_same_prompts_are_read_once_and_no_more_than_fits_is_kept() -> None:
    model = random_model("gpt2")
    passes: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        passes.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    editable = EditableModel(model, tiny_tokenizer(), 1)
    longest = max(len(prompt.split()) for prompt in PROMPTS)
    for _ in range(3):
        editable.read(PROMPTS).logits(None)
    assert passes == [longest - 1, 1, 1, 1]
    several = [PROMPTS[2], PROMPTS[0], PROMPTS[2]]
    torch.testing.assert_close(
        editable.read(several, among=PROMPTS).logits(None), editable.read(PROMPTS).logits(None)[[2, 0, 2]]
    )
    assert passes[4:] == [1, 1]
    editable.read(several).logits(None)
    assert passes[6:] == [longest - 1, 1]
    kept = editable.read(PROMPTS).bytes
    assert kept == 2 * LAYERS * len(PROMPTS) * (longest - 1) * WIDTH * 4
    small = EditableModel(model, tiny_tokenizer(), 1, kept=kept - 1)
    passes.clear()
    for prompts in (PROMPTS, PROMPTS, PROMPTS[:2], PROMPTS[:2]):
        small.read(prompts).logits(None)
    assert passes == [longest - 1, 1] * 2 + [2, 1, 1]
    with pytest.raises(UserError, match="layer 3 does not exist"):
        EditableModel(model, tiny_tokenizer(), LAYERS)
