"""Check every byte of a shard folder against its manifest, and say what is damaged and where.

Per shard: size, sha256, the tar structure with every header and padding byte; per block: crc32, npy headers, label
ranges, NaN and infinity. Prints one line per problem and exits 2 when there is any. With --rate it measures how fast
batches are read instead; several folders are then read as sources of equal parts.
"""

import argparse
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from trainer.errors import DataError, UserError
from trainer.stream import (
    DataConfig,
    Manifest,
    Mixture,
    SourceConfig,
    Sources,
    Stream,
    Stretch,
    lane_rows,
    load_manifests,
)
from trainer.stream.location import is_remote
from trainer.stream.scan import stray_shards, verify_shard


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
        parser.add_argument(
            flag, type=int, default=getattr(DataConfig, name), help=f"data.{name} of --rate (default %(default)s)"
        )


def run(args: argparse.Namespace) -> None:
    """Verify, or measure."""
    if any(is_remote(folder) for folder in args.folders):
        raise UserError(
            "verify reads local folders; remote blocks are checked against their crc32 whenever they are read"
        )
    if args.rate:
        measure(args)
        return
    for folder in args.folders:
        verify(Path(folder), Manifest.load(folder), args.threads)


def verify(folder: Path, manifest: Manifest, threads: int) -> None:
    """Check one folder. Raises DataError when anything is wrong with it."""
    problems = stray_shards(folder, manifest)
    began = time.perf_counter()
    size = sum(shard.bytes for shard in manifest.shards)
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc="verify") as bar,
        ThreadPoolExecutor(max(1, threads)) as pool,
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


def measure(args: argparse.Namespace) -> None:
    """Read whole epochs into batches and print rows per second of each."""
    names = [f"folder-{number}" for number in range(len(args.folders))]
    config = DataConfig(
        sources={name: SourceConfig(folder) for name, folder in zip(names, args.folders, strict=True)},
        global_batch=args.global_batch,
        lanes=args.lanes,
        window=args.window,
        threads=args.reader_threads,
    )
    config.validate()
    sources = Sources(load_manifests(config))
    shares = lane_rows(dict.fromkeys(names, 1 / len(names)), names, config.global_batch, config.lanes, "the mix")
    mixture = Mixture(sources.manifests, 0, config.global_batch, config.lanes, config.window, [Stretch(0, shares)])
    steps = sources.manifests[names[0]].rows // (shares[names[0]] * config.lanes)
    row_bytes = sources.manifest.row_bytes
    with Stream(config, sources, mixture, range(config.lanes)) as stream:
        for epoch in range(args.epochs):
            began = time.perf_counter()
            for _ in itertools.islice(stream, steps):
                pass
            rate = steps * config.global_batch / (time.perf_counter() - began)
            note = " (first use: crc32 and finiteness checked)" if epoch == 0 else ""
            print(f"epoch {epoch}: {rate / 1e6:.2f}M rows/s, {rate * row_bytes / 1e9:.2f} GB/s{note}")
