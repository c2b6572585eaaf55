"""What `alignsae verify` does; its arguments and its help are in tools/parsers."""

import argparse
import itertools
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
    manifest.require_shards(str(folder))
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
    asked = {
        "global_batch": args.global_batch,
        "lanes": args.lanes,
        "window": args.window,
        "threads": args.reader_threads,
    }
    config = DataConfig(
        sources={name: SourceConfig(folder) for name, folder in zip(names, args.folders, strict=True)},
        **{name: value for name, value in asked.items() if value is not None},
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
