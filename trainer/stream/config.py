"""Configuration of the activation stream."""

import math
import re
from dataclasses import dataclass, field, replace

from trainer.errors import UserError
from trainer.stream.live import LiveConfig
from trainer.stream.location import check_allowed
from trainer.stream.normalisation import MAX_NORM

LONGEST_TIMEOUT = 24 * 3600

# What no machine has: threads beyond these only wait for each other, a batch beyond it fits no memory.
MOST = {
    **{"global_batch": 1 << 30, "lanes": 1 << 20, "window": 1 << 30, "cache_bytes": 1 << 60},
    **{
        "threads": 256,
        "download_threads": 256,
        "retries": 1000,
        "heldout_rows": 1 << 50,
        "quarantine_budget": 1 << 50,
        "nonfinite_budget": 1 << 50,
    },
}


_SOURCE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@dataclass
class SourceConfig:
    """One of several data sets that stages mix."""

    shards: str = ""  # folder or URL of one split
    live: LiveConfig | None = None  # in place of shards: rows that a model computes meanwhile
    heldout: str = ""  # as data.heldout, rows of this source
    unlabelled: str | None = None  # as data.unlabelled, which counts where this is left out


@dataclass
class DataConfig:
    """Where rows come from and in which order they are read."""

    shards: str = ""  # folder or URL of one split: holds manifest.json and the tars
    # By name, in place of `shards`: data sets that the stages mix (stages.N.mix).
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    live: LiveConfig | None = None  # in place of `shards`: rows that a model computes meanwhile
    heldout: str = ""  # folder or URL of rows that are evaluated and never trained on (run.evaluate_every)
    heldout_rows: int = 8192  # rows of each held-out folder that are evaluated in training, spread over it; 0 = all
    global_batch: int = 1024  # G, rows per step over all data ranks
    lanes: int = 8  # L; the number of data ranks divides it, it divides global_batch
    window: int = 8  # blocks that a lane shuffles together
    unlabelled: str = "unknown"  # what a row without a label is: unknown, or none (it has none of the concepts)
    threads: int = 2  # prefetching threads; 0 = read in the training thread
    # Rows with a norm above this many times the median norm of the data weigh nothing; 0 = off.
    max_norm: float = MAX_NORM
    check: bool = True  # crc32 and finiteness of every block at its first use in a process
    quarantine_budget: int = 0  # damaged blocks that a rank may mask before it stops
    nonfinite_budget: int = 0  # rows with NaN or infinity that a rank may mask before it stops
    retries: int = 4  # further attempts for a read that failed, or a block that does not match its crc32
    timeout: float = 60.0  # seconds that one attempt at a remote block may take, connecting included
    cache_dir: str = "~/.cache/alignsae"  # remote blocks, shared by the processes of a node
    cache_bytes: int = 32 << 30  # upper bound of that cache
    download_threads: int = 8  # concurrent downloads per process
    allow_pipe: bool = False  # permit `pipe:COMMAND {name}` as data.shards: it runs COMMAND

    def validate(self) -> None:
        """Raise UserError for a value that cannot be."""
        chosen = [name for name in ("shards", "sources", "live") if getattr(self, name)]
        if not chosen:
            raise UserError("data.shards is empty; set it to a folder or URL that holds manifest.json")
        if len(chosen) > 1:
            raise UserError(
                f"data.{chosen[0]} and data.{chosen[1]} are both set; list all that is to be mixed in data.sources"
            )
        if self.heldout and self.sources:
            raise UserError("data.heldout belongs to data.shards; each source has its own, data.sources.NAME.heldout")
        for name, source in self.sources.items():
            if not _SOURCE.fullmatch(name):
                raise UserError(f"data.sources has the name {name!r:.60}; use a letter, then letters, digits, - and _")
            if not source.shards and not source.live:
                raise UserError(f"data.sources.{name}.shards is empty; set it to a folder or URL with manifest.json")
            if source.shards and source.live:
                raise UserError(f"data.sources.{name}.shards and .live are both set; make two sources of them")
            _check_unlabelled(f"data.sources.{name}", source.unlabelled or self.unlabelled)
        _check_unlabelled("data", self.unlabelled)
        for name in ("global_batch", "lanes", "window", "cache_bytes", "download_threads"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least 1")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"data.{name}={getattr(self, name)} must be at most {most}")
        for name in ("threads", "quarantine_budget", "nonfinite_budget", "retries", "heldout_rows"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name}={getattr(self, name)} must not be negative")
        if self.max_norm and not 1 < self.max_norm < math.inf:
            raise UserError(f"data.max_norm={self.max_norm} must be above 1, or 0 for off")
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise UserError(
                f"data.timeout={self.timeout} must be a number of seconds above 0, at most {LONGEST_TIMEOUT}"
            )
        for shards in self.heldout_locations().values():
            check_allowed(shards, self.allow_pipe)
        for key, source in self._each().items():
            if source.live:
                source.live.validate(f"{key}.live")
            else:
                check_allowed(source.shards, self.allow_pipe)

    def _each(self) -> dict[str, SourceConfig]:
        """The sources by their keys; `data` itself where there is one."""
        named = {f"data.sources.{name}": source for name, source in self.sources.items()}
        return named or {"data": SourceConfig(self.shards, live=self.live, unlabelled=self.unlabelled)}

    def locations(self) -> dict[str, str]:
        """Where the rows are, or what they are computed from, by the key that says so."""
        found = {}
        for key, source in self._each().items():
            live = source.live
            found[f"{key}.live" if live else f"{key}.shards"] = live.texts or live.prompts if live else source.shards
        return found

    def computed(self) -> dict[str, LiveConfig]:
        """What is computed, by the name of the source; "" where there is one."""
        named = {name: source.live for name, source in self.sources.items()} or {"": self.live}
        return {name: live for name, live in named.items() if live}

    def heldout_locations(self) -> dict[str, str]:
        """Where held-out rows are, by the key that says so; without those that are not set."""
        named = {f"data.sources.{name}.heldout": source.heldout for name, source in self.sources.items()}
        return {key: location for key, location in (named or {"data.heldout": self.heldout}).items() if location}

    def negatives(self) -> list[str]:
        """Keys that say that rows without a label have none of the concepts."""
        each = {f"data.sources.{name}": source.unlabelled or self.unlabelled for name, source in self.sources.items()}
        return [f"{key}.unlabelled" for key, value in (each or {"data": self.unlabelled}).items() if value == "none"]

    def of(self, source: str) -> "DataConfig":
        """The settings for one of the sources alone."""
        if not self.sources:
            return self
        chosen = self.sources[source]
        unlabelled = chosen.unlabelled or self.unlabelled
        return replace(
            self, shards=chosen.shards, live=chosen.live, heldout=chosen.heldout, unlabelled=unlabelled, sources={}
        )


def _check_unlabelled(where: str, value: str) -> None:
    if value not in ("unknown", "none"):
        raise UserError(f"{where}.unlabelled={value!r} is unknown; use unknown or none")
