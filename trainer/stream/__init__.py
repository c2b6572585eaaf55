"""The activation stream: shards on disk, the order in which rows are read, and batches of this rank."""

from trainer.stream.config import DataConfig, SourceConfig
from trainer.stream.digest import RowDigest, step_digest
from trainer.stream.live import ComputedRows, Computer, LiveConfig
from trainer.stream.manifest import Block, ComputedBlock, Manifest, Shard, ShardSpec
from trainer.stream.mix import lane_rows
from trainer.stream.mixture import Mixture, Stretch
from trainer.stream.plan import Order, Plan, lanes_of_rank
from trainer.stream.reader import Batch, Stream
from trainer.stream.shards import ShardWriter
from trainer.stream.sources import SINGLE, Sources, load_manifests

__all__ = [
    "SINGLE",
    "Batch",
    "Block",
    "ComputedBlock",
    "ComputedRows",
    "Computer",
    "DataConfig",
    "LiveConfig",
    "Manifest",
    "Mixture",
    "Order",
    "Plan",
    "RowDigest",
    "Shard",
    "ShardSpec",
    "ShardWriter",
    "SourceConfig",
    "Sources",
    "Stream",
    "Stretch",
    "lane_rows",
    "lanes_of_rank",
    "load_manifests",
    "step_digest",
]
