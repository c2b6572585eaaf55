"""Small dictionaries and a random GPT-2 whose words are single tokens."""

import json
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tools.lm_training.models import build_model, build_tokenizer
from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.language_model import Prompt, capture, encode_prompts, hook_point, last_token
from trainer.stream import ShardSpec, ShardWriter
from trainer.train import main as train

WIDTH = 32
CONCEPTS = ["city", "major", "work"]
PEOPLE = ["ann", "bob", "cem", "dan"]
ANSWERS = {
    "city": ["rome", "oslo", "lima", "bonn"],
    "major": ["art", "law", "math", "bio"],
    "work": ["acme", "zeta"] * 2,
}


def words() -> list[str]:
    """Vocabulary in token order: special tokens, then every word of the prompts and answers."""
    return [
        "<pad>",
        "<unk>",
        "Q",
        "where",
        "which",
        *CONCEPTS,
        *PEOPLE,
        *sorted({a for v in ANSWERS.values() for a in v}),
    ]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, no end token: greedy answers then have exactly the tokens that were asked for."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def tiny_model(seed: int = 0) -> GPT2LMHeadModel:
    """Random GPT-2 with two blocks of width 32, in evaluation mode."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(words()), n_positions=16, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


def save_tiny_model(folder: Path) -> Path:
    """`save_pretrained` folder of the tiny model and its tokenizer."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_model_of(texts: list[str], folder: Path, context: int = 64) -> None:
    """`save_pretrained` folder of a random GPT-2 of two blocks of width 16, which has a tokenizer of these texts."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(texts, 280)
    build_model("gpt2", tokenizer, layers=2, width=16, heads=2, context=context).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_prompts() -> list[Prompt]:
    """Two templates per person and relation; `which` is the held-out one."""
    splits: dict[str, Literal["train", "heldout"]] = {"where": "train", "which": "heldout"}
    return [
        Prompt(f"Q {opening} {person} {concept}", ANSWERS[concept][i], concept, opening, split, person)
        for i, person in enumerate(PEOPLE)
        for concept in CONCEPTS
        for opening, split in splits.items()
    ]


def random_dictionary(
    free_slots: int = 50, bank_slots: int = 16, *, decoder_norm: str = "free", seed: int = 0
) -> ConceptDictionary:
    """Dictionary with random weights everywhere, the normalisation included."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = ConceptDictionary(
        DictionaryConfig(free_slots, bank_slots, decoder_norm=decoder_norm).form(WIDTH, CONCEPTS)
    )
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    dictionary.set_normalisation(torch.randn(WIDTH, generator=generator).tolist(), 1.7)
    return dictionary


def exact_dictionary() -> ConceptDictionary:
    """Dictionary that reconstructs every activation exactly: free slots read +e_i and -e_i and write them back."""
    dictionary = ConceptDictionary(DictionaryConfig(2 * WIDTH, WIDTH).form(WIDTH, CONCEPTS))
    with torch.no_grad():
        for bank, sign in zip(dictionary.free_banks(), (1, -1), strict=True):
            bank.W_enc.copy_(sign * torch.eye(WIDTH))
            bank.W_dec.copy_(sign * torch.eye(WIDTH))
    return dictionary


def write_shards(folder: Path, model: GPT2LMHeadModel, prompts: list[Prompt], layer: int, split: str) -> None:
    """Activations of the prompts' last tokens after block `layer`, as a shard folder."""
    tokenizer = tiny_tokenizer()
    ids, mask = encode_prompts(tokenizer, [p.prompt for p in prompts])
    acts = capture(model, ids, mask, [layer])[layer][torch.arange(len(prompts)), last_token(mask)]
    answers = sorted({a for group in ANSWERS.values() for a in group})
    spec = ShardSpec(
        width=WIDTH,
        dtype="float32",
        concepts=CONCEPTS,
        answers=answers,
        model="tiny",
        hook_point=hook_point(layer),
        extra={"token_position": "last prompt token"},
    )
    with ShardWriter(folder, split, spec, rows_per_block=8) as writer:
        concept = torch.tensor([CONCEPTS.index(p.concept) for p in prompts])
        writer.write(acts, concept, torch.tensor([answers.index(p.answer) for p in prompts]))


def train_tiny_run(folder: Path) -> Path:
    """Language model, prompts, shards, and the runs `aligned` and `plain` (no align stage) in one folder."""
    save_tiny_model(folder / "lm")
    lines = [json.dumps(vars(p)) for p in tiny_prompts()]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    for split in ("train", "heldout"):
        chosen = [p for p in tiny_prompts() if p.split == split]
        write_shards(folder / "data" / split, tiny_model(), chosen, 1, split)
    for name, stages in STAGES.items():
        path = folder / f"{name}.yaml"
        path.write_text(f"{CONFIG}stages: {stages}\n")
        data = [f"data.shards={folder / 'data' / 'train'}", f"data.heldout={folder / 'data' / 'heldout'}"]
        assert train(["--config", str(path), *data, f"run.dir={folder / name}"]) == 0
    return folder


CONFIG = """
run: {precision: fp32, log_every: 10, evaluate_every: 30}
data: {global_batch: 12, lanes: 1, threads: 0}
dictionary: {free_slots: 64, bank_slots: 32}
optim: {lr: 0.01, warmup: 5}
tracking: {uri: "off"}
"""
STAGES = {
    "aligned": "[{name: pretrain, steps: 20}, {name: align, steps: 150}]",
    "plain": "[{name: pretrain, steps: 40}]",
}
