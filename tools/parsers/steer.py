r"""Generate text with chosen slots of a dictionary changed, next to the text without.

  alignsae steer --run runs/demo --model models/demo --prompt 'Q: Where does Ada work?\nA:' employer=0 birth_city=1.5
  alignsae steer --run exported/demo --model models/demo --prompt 'Q: Where does Ada work?\nA:' --mode ablate employer
      --temperature 0.7 --chart --png steered.png

SLOT is a concept, or the number of any slot; a strength of 1 is the mean activation of the slot where its concept is
there, which the run, or its export, holds. --mode says what happens to the activation, --where at which tokens. Slots
that are not named keep their value, and so does what the dictionary does not reconstruct.
"""

import argparse
from pathlib import Path

from tools.parsers.common import add_device

MODES = ("set", "add", "scale", "suppress", "clamp", "ablate")
WHERE = ("prompt_end", "all", "generated")


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
    parser.add_argument("--mode", choices=MODES, default="set", help="how a slot is changed (default: set)")
    parser.add_argument("--where", choices=WHERE, default="prompt_end", help="at which tokens (default: prompt_end)")
    parser.add_argument("--read", action="append", default=[], metavar="SLOT", help="a further slot of the charts")
    parser.add_argument("--train", help="shards for the slots' mean activations, where the run holds none")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="tokens to generate (default: 24)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0: the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the likeliest (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from so many likeliest tokens; 0: all (default)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--chart", action="store_true", help="print the slots' activations token by token")
    parser.add_argument("--time", type=int, metavar="N", help="say what steering adds to a token, from N turns of each")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them, of the first prompt")
    add_device(parser, "the model")
