"""Blocks whose rows are computed when they are asked for. Who computes them knows a model; this room does not."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from trainer.errors import DataError, UserError
from trainer.labels import BadLabel, canonical
from trainer.stream.attempts import Deadline, Final, Unreachable
from trainer.stream.blocks import BlockRows, FileIdentity
from trainer.stream.manifest import STORED_DTYPES, Manifest

_SAME: FileIdentity = (0, 0, 0, 0)  # what is computed again is the same


@dataclass
class LiveConfig:
    """Rows that a language model computes when they are asked for, as `alignsae extract` would store them; the settings
    are its arguments (docs/data.md, "Live")."""

    model: str = ""  # save_pretrained folder or hub name
    texts: str = ""  # JSONL file or datasets folder of unlabelled text, a row per token
    prompts: str = ""  # in place of texts: JSONL of labelled rows
    hook: str = ""  # hook point, such as blocks.6.hook_resid_post
    manifest: str = ""  # folder whose manifest.json these rows have; "": it is made when the run begins
    sample: int = 100_000  # rows that a manifest made here takes mean and scale from, at least
    field: str = "text"  # of texts, that holds the text
    context: int = 512  # longest window of a text, tokens
    skip_first: int = 0  # tokens of each window that are no rows
    drop_special: bool = False  # special tokens of a text are no rows
    outside: str = "none"  # what tokens outside of all spans are: none | unknown
    heldout: int = 0  # every N-th row without a split is held out (0 = none)
    unit_kb: int = 16  # KiB of text that are computed together; a manifest made here makes a block of them
    batch_size: int = 64  # sequences per forward pass
    precision: str = "fp32"  # of the forward pass: fp32 | bf16
    dtype: str = "float16"  # as shards would store the rows
    device_map: str = ""  # auto: spread a model over all devices of the one process

    def validate(self, where: str) -> None:
        """Raise UserError for a value that cannot be; `where` is the name of the section."""
        for name in ("model", "hook"):
            if not getattr(self, name):
                raise UserError(f"{where}.{name} is empty; live rows need a model, texts or prompts, and a hook point")
        if bool(self.texts) == bool(self.prompts):
            raise UserError(f"{where}: set one of texts and prompts")
        for name in ("sample", "context", "unit_kb", "batch_size"):
            if not 1 <= getattr(self, name) <= 1 << 40:
                raise UserError(f"{where}.{name}={getattr(self, name)} must be at least 1, and a size of this world")
        for name in ("skip_first", "heldout"):
            if getattr(self, name) < 0:
                raise UserError(f"{where}.{name}={getattr(self, name)} must not be negative")
        for name, known in (
            ("outside", ("none", "unknown")),
            ("precision", ("fp32", "bf16")),
            ("dtype", tuple(STORED_DTYPES)),
            ("device_map", ("", "auto")),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{where}.{name}={getattr(self, name)!r} is unknown; use {' or '.join(filter(None, known))}"
                )


class ComputedRows(NamedTuple):
    """Rows of a block: acts [n, D] as shards store them, concept integers [n] or [n, M], answer integers [n]."""

    acts: np.ndarray
    concept: np.ndarray
    answer: np.ndarray


class Computer(Protocol):
    """Computes the blocks of a data set. Thread-safe."""

    @property
    def tokens(self) -> int:
        """Tokens that the model has read so far."""
        ...

    def rows(self, index: int) -> ComputedRows:
        """The rows of a block. Raises UserError when they cannot be computed."""
        ...

    def where(self, index: int) -> str:
        """Which block that is, for messages."""
        ...


class LiveBlocks:
    """Blocks that are computed, for BlockSource (see source.Blocks)."""

    side_by_side = 0

    def __init__(self, manifest: Manifest, computer: Computer):
        self.manifest, self.computer = manifest, computer

    def open(
        self, index: int, deadline: Deadline, fresh: bool, checked: FileIdentity | None
    ) -> tuple[BlockRows, FileIdentity]:
        """The rows of a block. Raises Final when they are not what the manifest says."""
        if deadline.given_up:
            raise Unreachable("given up")
        manifest, rows = self.manifest, self.computer.rows(index)
        count = int(manifest.block_rows[index])
        if rows.acts.shape != (count, manifest.width):
            raise Final(f"gives rows {rows.acts.shape}, the manifest says ({count}, {manifest.width})")
        try:
            concept = canonical(rows.concept, len(manifest.concepts))
        except BadLabel as error:
            raise Final(f"row {error.row}: {error}") from None
        answer = rows.answer.astype(np.int32)
        return BlockRows(rows.acts, concept, answer, np.ones(count, dtype=bool), np.zeros(count, dtype=bool)), _SAME

    def origin(self, index: int, deadline: Deadline) -> np.ndarray | None:
        """Raises DataError: tools that ask read shards."""
        raise DataError(f"{self.where(index)}: rows that are computed; extract them to look where they come from")

    def where(self, index: int) -> str:
        """Which block that is, for messages."""
        return self.computer.where(index)

    def close(self) -> None:
        """Nothing is held here."""
