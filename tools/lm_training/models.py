"""A tokenizer and a model from scratch."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trainer.errors import UserError

END, PAD = "<|endoftext|>", "<|pad|>"


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Byte-level BPE of at most `vocabulary` tokens trained on `texts`; an end token and a padding token of its own."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocabulary < smallest:
        raise UserError(f"--vocabulary {vocabulary}: a byte-level tokenizer needs at least {smallest} tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=PAD)


def build_model(architecture: str, tokenizer: Any, layers: int, width: int, heads: int, context: int) -> Any:
    """Randomly initialised causal LM of a transformers architecture ("gpt2", "llama", "gpt_neox", ...), no dropout."""
    if width % heads:
        raise UserError(f"--width {width} is not divisible by --heads {heads}")
    end = tokenizer.eos_token_id
    try:
        config = AutoConfig.for_model(
            architecture,
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=context,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
        if getattr(config, "activation_function", "") == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function in one pass
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise UserError(f"--from-scratch {architecture}: transformers knows no such causal language model") from error
