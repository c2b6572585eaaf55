"""Memory per rank and bytes moved per step of a configuration under every strategy, before anything is launched.

    alignsae plan --config configs/large.yaml --devices 64 --device-memory 80GiB --width 4096 --concepts 100
    alignsae plan --config configs/large.yaml --devices 8 --width 4096 --device h100
    alignsae plan --scaling > table.md

Width and concepts come from the manifests of the data, or from --width and --concepts where the data does not exist
yet. Memory is the peak within a step: weights, gradients, AdamW's two moments (fp32 unless optim.state=bf16), what a
strategy gathers or copies, and what the largest bank needs while it is computed; or, where that is more, what building
the engine takes. `snapshot` is host memory: with checkpoint.asynchronous a rank keeps a copy of what it saves (weights
and moments of its units). Bytes are what one rank sends in one step; it receives as many. With --backend gloo the
figures are those of CPU ranks, where a reduce-scatter costs an all-reduce and an all-gather a copy, and snapshots count
in the total; the tests hold them against measurements. With --device the seconds of a step follow, reckoned from the
bytes and operations of each CUDA kernel and the maker's figures of the device (tools/planning/seconds.py): what a
measured step can be judged by.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Configuration, devices, and sizes where there is no data yet."""
    parser.add_argument("--config", help="YAML file of the run; see configs/")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="ranks (default %(default)s)")
    parser.add_argument("--device-memory", default="80GiB", metavar="SIZE", help="per rank (default %(default)s)")
    parser.add_argument(
        "--device",
        dest="device_name",  # not one to compute on
        choices=("a100", "b200", "h100", "h200"),
        help="also reckon the seconds of a step",
    )
    parser.add_argument("--l0", type=float, default=64.0, help="active slots of a row, for --device (%(default)s)")
    parser.add_argument("--width", type=int, help="model width D, where the data does not exist yet")
    parser.add_argument("--concepts", type=int, default=0, help="concepts R, with --width (default %(default)s)")
    parser.add_argument("--answers", type=int, default=0, help="answers A, with --width (default %(default)s)")
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the estimates here as well")
    parser.add_argument("--scaling", action="store_true", help="print the Markdown table of docs/scaling.md instead")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
