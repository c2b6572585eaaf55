"""Check every byte of a shard folder against its manifest, and say what is damaged and where.

Per shard: size, sha256, the tar structure with every header and padding byte; per block: crc32, npy headers, label
ranges, NaN and infinity. Prints one line per problem and exits 2 when there is any. With --rate it measures how fast
batches are read instead; several folders are then read as sources of equal parts.
"""

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae verify`."""
    parser.add_argument(
        "folders", nargs="+", metavar="folder", help="folder of one split: holds manifest.json and the tars"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="shards checked at a time (default: cores)"
    )
    parser.add_argument("--rate", action="store_true", help="measure rows per second into batches, epoch by epoch")
    parser.add_argument(
        "--epochs", type=int, default=3, help="epochs of the first folder that --rate reads (default 3)"
    )
    for name in ("global_batch", "lanes", "window", "threads"):
        flag = "--reader-threads" if name == "threads" else "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, help=f"data.{name} of --rate (default: that of a configuration)")
