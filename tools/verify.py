"""Check every byte of a shard folder against its manifest, and say what is damaged and where.

Per shard: size, sha256, the tar structure with every header and padding byte; per block: crc32, npy headers, label
ranges, NaN and infinity. Prints one line per problem and exits 2 when there is any. With --rate it measures how fast
batches are read instead.
"""

import argparse
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from trainer.errors import DataError, UserError
from trainer.stream import DataConfig, Manifest, Plan, Stream
from trainer.stream.location import is_remote
from trainer.stream.scan import stray_shards, verify_shard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae verify`."""
    parser.add_argument("folder", help="folder of one split: holds manifest.json and the tars")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="shards checked at a time (default: cores)"
    )
    parser.add_argument("--rate", action="store_true", help="measure rows per second into batches, epoch by epoch")
    parser.add_argument(
        "--epochs", type=int, default=3, help="epochs that --rate reads (default 3; the first one checks crc32)"
    )
    for name in ("global_batch", "lanes", "window", "threads"):
        flag = "--reader-threads" if name == "threads" else "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=int, default=getattr(DataConfig, name), help=f"data.{name} of --rate (default %(default)s)"
        )


def run(args: argparse.Namespace) -> None:
    """Verify, or measure."""
    if is_remote(args.folder):
        raise UserError(
            "verify reads local folders; remote blocks are checked against their crc32 whenever they are read"
        )
    manifest = Manifest.load(args.folder)
    if args.rate:
        measure(args, manifest)
        return
    folder = Path(args.folder)
    problems = stray_shards(folder, manifest)
    began = time.perf_counter()
    size = sum(shard.bytes for shard in manifest.shards)
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc="verify") as bar,
        ThreadPoolExecutor(max(1, args.threads)) as pool,
    ):
        for found in pool.map(lambda shard: list(verify_shard(folder, manifest, shard, bar.update)), manifest.shards):
            problems += found
    seconds = time.perf_counter() - began
    for problem in problems:
        print(problem)
    if problems:
        raise DataError(
            f"{folder}: {len(problems)} problems; restore the shards, or train on with data.quarantine_budget "
            "and data.nonfinite_budget"
        )
    print(
        f"{folder}: {manifest.rows} rows in {len(manifest.shards)} shards are intact "
        f"({size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s), digest {manifest.digest[:16]}"
    )


def measure(args: argparse.Namespace, manifest: Manifest) -> None:
    """Read whole epochs into batches and print rows per second of each."""
    config = DataConfig(
        shards=args.folder,
        global_batch=args.global_batch,
        lanes=args.lanes,
        window=args.window,
        threads=args.reader_threads,
    )
    config.validate()
    plan = Plan(manifest, 0, config.global_batch, config.lanes, config.window)
    with Stream(config, manifest, plan, range(config.lanes)) as stream:
        for epoch in range(args.epochs):
            began = time.perf_counter()
            for _ in itertools.islice(stream, plan.steps_per_epoch):
                pass
            rate = plan.steps_per_epoch * plan.global_batch / (time.perf_counter() - began)
            gigabytes = rate * manifest.width * (4 if manifest.dtype == "float32" else 2) / 1e9
            note = " (first use: crc32 and finiteness checked)" if epoch == 0 else ""
            print(f"epoch {epoch}: {rate / 1e6:.2f}M rows/s, {gigabytes:.2f} GB/s{note}")
