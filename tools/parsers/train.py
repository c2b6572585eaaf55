"""Train a dictionary on all ranks that a launch file names; a rank's failure is one line, and its exit code is that of
this command.

  alignsae train --config configs/demo.yaml run.dir=runs/demo
  alignsae train --launch zero3 --processes 4 --config configs/large.yaml data.shards=data/large/layer-15/train

It does what `accelerate launch [--config_file launch/accelerate/NAME.yaml] -m trainer.train --config ...` does, which
goes on to work beside it. 0: finished. 2: refused or given up. 75: saved and left, start it again. 130: saved and left
because of Ctrl-C.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae train`."""
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument(
        "--launch",
        metavar="NAME",
        help="launch file, by path or by its name in launch/accelerate (default: accelerate's own)",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="ranks of this machine; wins over the launch file")
    parser.add_argument(
        "--accelerate",
        default="",
        metavar="OPTIONS",
        help="further options of `accelerate launch`, as one text: --accelerate='--num_machines 2 ...'",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
