"""Swap one concept for another in a running language model -> RUN/swap.json

  alignsae swap --run runs/demo --model models/demo --prompts data/demo/questions.jsonl

At the last prompt token the slot of the asked relation is set to 0 and the slot of another relation to alpha times its
mean activation on its own concept (training shards); the model then answers greedily. A swap succeeds when the answer
is the other relation's answer for the same subject: the whole of it, or as --match says (`alignsae ask` suggests a
rule, and keeps the prompts that the model answers at all). Beside it stands the yardstick that needs no dictionary,
h + alpha * (mean of the target relation - mean of the asked relation), and other rivals (--rivals, --unsupervised,
--beside), all fitted on the same training rows.

Alpha is chosen on other prompts than those that are reported: where --split is heldout on the prompts of split
validation, without them on the training templates; else on one half of the subjects, while the other half is reported.
It is the smallest one whose success is within a standard error of the best: a larger one does more to all the rest.
Rivals that learn through the model learn from the prompts of split train: to give the other answer, and with
--learn-texts to move as little else as they can: they then learn for the harmonic mean of three shares of probability,
as in the joint score, at strength 1, and stay there. Standard errors are over subjects.

At that strength every method is also asked what it leaves alone, in two forms: the edit always, and only where the
method itself reads the concept that is swapped away. Isolation: the subject's other questions, still answered right.
KL: how far the next token's distribution moves at those questions, and on ordinary text (--texts) that is edited at
every token. Fluency: perplexity of unedited over that of edited continuations of text. Joint: the harmonic mean of
success, isolation and a score of side effects (trainer/analysis/side_effects.py). Suppressed: prompts whose right
answer is gone when their concept is suppressed.
"""

import argparse
import re
from pathlib import Path

from tools.parsers.common import MATCH, add_device, add_run

RIVALS = {
    "probe": "logistic regression, its weight as direction",
    "erasure": "LEACE",
    "slots_learned": "the slots with decoder rows learned through the model",
    "das_K": "distributed alignment search in K dimensions; das: as many as there are concepts",
}
_RIVAL = re.compile(r"probe\Z|erasure\Z|slots_learned\Z|das(_[1-9]\d{0,4})?\Z")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}\Z")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae swap`."""
    add_run(parser)
    parser.add_argument("--model", required=True, help="the language model that the activations came from")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSONL with prompt or messages, answer, concept, subject, split"
    )
    parser.add_argument("--train", help="shards for the means (default: the shards in RUN/config.yaml)")
    parser.add_argument(
        "--alphas",
        type=_numbers,
        default=[0.5, 1.0, 1.5, 2.0, 3.0, 5.0],
        help="comma-separated strengths (default: 0.5,1,1.5,2,3,5)",
    )
    parser.add_argument(
        "--pairs", type=int, default=600, help="swaps to report; half as many choose alpha (default: 600)"
    )
    parser.add_argument(
        "--mode",
        choices=("add", "replace"),
        default="add",
        help="write back h + decode(z') - decode(z), or decode(z') (default: add)",
    )
    parser.add_argument(
        "--split", choices=("heldout", "train", "all"), default="heldout", help="prompts to swap (default: heldout)"
    )
    parser.add_argument(
        "--match",
        choices=MATCH,
        default="exact",
        help="exact: the whole answer; prefix: it begins so; first: its first token (default: exact)",
    )
    parser.add_argument(
        "--rivals",
        type=_rivals,
        default="probe,erasure,das_1,das,slots_learned",
        help=f"beside the mean difference, comma-separated ({'; '.join(f'{n}: {what}' for n, what in RIVALS.items())}) "
        "or none (default: probe,erasure,das_1,das,slots_learned)",
    )
    parser.add_argument("--unsupervised", type=Path, help="run folder of a dictionary whose best slots are a rival")
    parser.add_argument(
        "--beside",
        type=_named_run,
        action="append",
        default=[],
        metavar="NAME=RUN",
        help="run folder of another dictionary with slots for the same concepts; may be repeated",
    )
    parser.add_argument(
        "--learn-steps", type=int, default=200, help="steps in which das and slots_learned learn (default: 200)"
    )
    parser.add_argument(
        "--learn-rates",
        type=_numbers,
        default=[0.01],
        help="rate at which they learn; of several, comma-separated, each takes the one with which the swaps that "
        "choose alpha have the smallest cross-entropy (default: 0.01)",
    )
    parser.add_argument(
        "--learn-texts",
        type=Path,
        metavar="FILE",
        help="ordinary text, other than --texts: they learn to leave it and the subject's other questions alone, too; "
        "half of it is to choose the rate on",
    )
    parser.add_argument(
        "--learned",
        type=Path,
        metavar="FILE",
        help="also write what the slots of slots_learned write, for `alignsae export --written FILE`",
    )
    parser.add_argument("--texts", type=Path, help="JSONL or data set of ordinary text, for the side effects on it")
    parser.add_argument("--field", default="text", help="field that holds the text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which prompts are drawn (default: 0)")
    parser.add_argument("--batch-size", type=int, default=256, help="prompts per forward pass (default: 256)")
    add_device(parser, "model and dictionary")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN/swap.json)")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _rivals(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    for name in names:
        if not _RIVAL.match(name):
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(RIVALS)}")
    return names


def _named_run(text: str) -> tuple[str, Path]:
    name, _, run = text.partition("=")
    if not _NAME.match(name) or not run:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RUN")
    return name, Path(run)
