"""Write a configuration and a launch file to begin with -> DIR/train.yaml, DIR/launch.yaml

  alignsae init mine --data data/mine/layer-06/train
  alignsae train --launch mine/launch.yaml --config mine/train.yaml

Both are copies of files that come with this program: --config one of configs/, --launch one of launch/accelerate/.
`alignsae config` says what every key means.
"""

import argparse
from pathlib import Path

START, LAUNCH = "paper", "single"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae init`."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder to write into; made where it is not there")
    parser.add_argument("--config", default=START, metavar="NAME", help=f"configuration to copy (default: {START})")
    parser.add_argument("--launch", default=LAUNCH, metavar="NAME", help=f"launch file to copy (default: {LAUNCH})")
    parser.add_argument("--data", metavar="SHARDS", help="folder or URL for data.shards (default: as it stands there)")
