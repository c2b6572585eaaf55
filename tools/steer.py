r"""Generate text with chosen concept slots set by hand, next to the text without.

  alignsae steer --run runs/demo --model models/demo --prompt 'Q: Where does Ada work?\nA:' employer=0 birth_city=1.5

CONCEPT=ALPHA sets the slot of that concept, at the last prompt token, to ALPHA times its mean activation on its own
concept (training shards); 0 switches it off. Slots that are not named keep their value.
"""

import argparse
from difflib import get_close_matches
from pathlib import Path

from trainer.analysis.evaluation import concept_slot_means
from trainer.analysis.interventions import hook_layer, steering
from trainer.analysis.language_model import edit_residual, generate_answers, load_language_model
from trainer.analysis.results import rows_of, run_shards
from trainer.checkpoint import load_dictionary
from trainer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae steer`."""
    parser.add_argument("settings", nargs="+", metavar="CONCEPT=ALPHA", help="strength of a concept's slot")
    parser.add_argument(
        "--run", dest="run_dir", type=Path, required=True, help="run folder (its newest checkpoint is read)"
    )
    parser.add_argument("--model", required=True, help="the language model that the activations came from")
    parser.add_argument(
        "--prompt", action="append", required=True, help=r"prompt, \n for a line break; may be given several times"
    )
    parser.add_argument("--train", help="shards for the slots' mean activations (default: those in RUN/config.yaml)")
    parser.add_argument(
        "--mode", choices=("add", "replace"), default="add", help="as in `alignsae swap` (default: add)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=24, help="tokens to generate (default: 24)")
    parser.add_argument("--device", default="cpu", help="device of model and dictionary (default: cpu)")


def run(args: argparse.Namespace) -> None:
    """Print prompt, text before and text after for every prompt."""
    dictionary, trained_on = load_dictionary(args.run_dir)
    dictionary.to(args.device)
    alphas = dict(_setting(text, dictionary.concept_names) for text in args.settings)
    rows, _ = rows_of(args.train or run_shards(args.run_dir), dictionary)
    means = concept_slot_means(dictionary, rows)
    model, tokenizer = load_language_model(args.model, args.device)
    prompts = [p.replace("\\n", "\n") for p in args.prompt]
    longest = max(len(tokenizer(p)["input_ids"]) for p in prompts) + args.max_new_tokens
    limit = getattr(model.config, "max_position_embeddings", longest)
    if longest > limit:
        raise UserError(f"prompt and answer may take {longest} tokens, the model reads {limit}; lower --max-new-tokens")
    before = generate_answers(model, tokenizer, prompts, args.max_new_tokens)
    edit = steering(dictionary, {slot: alpha * float(means[slot]) for slot, alpha in alphas.items()}, args.mode)
    with edit_residual(model, hook_layer(trained_on.hook_point), edit):
        after = generate_answers(model, tokenizer, prompts, args.max_new_tokens)
    for prompt, plain, steered in zip(prompts, before, after, strict=True):
        print(f"prompt: {prompt!r}\nbefore: {plain}\nafter:  {steered}\n")


def _setting(text: str, concepts: list[str]) -> tuple[int, float]:
    name, _, value = text.rpartition("=")
    if name not in concepts:
        near = get_close_matches(name, concepts, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the concepts are {', '.join(concepts)}"
        raise UserError(f"{text!r}: no concept {name!r}; {hint}")
    try:
        return concepts.index(name), float(value)
    except ValueError:
        raise UserError(f"{text!r}: {value!r} is no number; write {name}=1.5 for example") from None
