"""Time the training step against its floor and against dense autograd, on synthetic rows.

The floor is what no step can avoid: one encoder product (bf16, or fp32 on a CPU that emulates bf16) and one pass of
fused AdamW, measured in the same process on the same shapes. Timed steps are whole ones (forward, backward, clipping,
AdamW with learning rate 0) through the objective and strategy that training uses. Repetitions are interleaved and
medians are reported, so that a busy machine disturbs all subjects alike; the floor and our sparse step take turns
first, then the dense steps, whose gigabytes of temporary memory would slow down what runs between them. The mean L0 is
set through the encoder bias, or the thresholds of --gate batch_topk and jumprelu: one value for all free slots, chosen
on the rows. Weights and rows are Gaussian, so activity is spread evenly over slots. Peak memory is the growth of
resident memory in a process of its own.
"""

import argparse
from pathlib import Path

from tools.parsers.common import add_device
from tools.timing.setting import Setting

AXES = ("slots", "rows", "l0", "concepts")
GATES = ("relu", "batch_topk", "jumprelu")  # keys of trainer.dictionary.GATES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, sweeps and what to compare with."""
    d = Setting()
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: does it work at all")
    parser.add_argument("--width", type=int, default=d.width, help="model width D (default %(default)s)")
    parser.add_argument("--slots", type=int, default=d.slots, help="free slots K (default %(default)s)")
    parser.add_argument("--bank-slots", type=int, default=d.bank_slots, help="slots of a bank (default %(default)s)")
    parser.add_argument("--concepts", type=int, default=d.concepts, help="concept slots R (default %(default)s)")
    parser.add_argument("--rows", type=int, default=d.rows, help="rows B of a step (default %(default)s)")
    parser.add_argument("--l0", type=float, default=d.l0, help="mean active free slots per row (default %(default)s)")
    parser.add_argument("--gate", choices=GATES, default=d.gate, help="gate of the free slots (default %(default)s)")
    parser.add_argument(
        "--gates", nargs="+", choices=GATES, default=[], help="also time our step with these gates, which take turns"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed repetitions of each subject (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: what torch chooses)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds instead of wall seconds, on one thread: for a busy machine",
    )
    add_device(parser, "what is timed")
    for axis in AXES:
        kind = float if axis == "l0" else int
        parser.add_argument(
            f"--sweep-{axis}", type=kind, nargs="+", default=[], metavar="N", help=f"also time our step at these {axis}"
        )
    parser.add_argument("--compile", action="store_true", help="also time the dense bf16 step under torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="skip the measurements of peak memory")
    parser.add_argument("--peers", action="store_true", help="also time SAELens and sparsify (needs --peers-python)")
    parser.add_argument(
        "--peers-python", metavar="PYTHON", help="interpreter of the environment that has them installed"
    )
