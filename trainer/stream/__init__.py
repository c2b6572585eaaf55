"""The activation stream: shards on disk, the order in which rows are read, and batches of this rank."""

from trainer.stream.config import DataConfig
from trainer.stream.digest import RowDigest, step_digest
from trainer.stream.manifest import Block, Manifest, Shard, ShardSpec
from trainer.stream.plan import Plan, lanes_of_rank
from trainer.stream.reader import Batch, Stream
from trainer.stream.shards import ShardWriter

__all__ = [
    "Batch",
    "Block",
    "DataConfig",
    "Manifest",
    "Plan",
    "RowDigest",
    "Shard",
    "ShardSpec",
    "ShardWriter",
    "Stream",
    "lanes_of_rank",
    "step_digest",
]
