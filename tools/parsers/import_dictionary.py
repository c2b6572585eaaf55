"""Bring a dictionary that was trained elsewhere into a folder that `dictionary.start_from` begins with.

  alignsae import SOURCE --out imported/mine [--rows data/mine/layer-15/train]

SOURCE is a folder or an address below which one dictionary lies (local, hf://, s3://, https:// ...):
  SAELens      cfg.json, sae_weights.safetensors (standard, jumprelu, topk, batchtopk)
  sparsify     cfg.json, sae.safetensors (TopK)
  Gemma Scope  params.npz
  alignsae     a run, a checkpoint, or what `alignsae export` wrote

Weights are turned into such that act on raw activations. A dictionary that keeps the k largest of a row gets one
threshold instead, above which as many entries lie on average on the rows of --rows; what both do there is printed.
Pickle is never read.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae import`."""
    parser.add_argument("source", metavar="SOURCE", help="folder, .npz file or address of one dictionary")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--rows", metavar="SHARDS", help="shard folder: thresholds of TopK, and L0 and FVU of any dictionary"
    )
    parser.add_argument("--model", help="model it is of, where the source says nothing or uses another name")
    parser.add_argument("--hook-point", help="hook point it is of, likewise (blocks.N.hook_resid_post)")
