"""The data sets of a run: by name, with one normalisation and one vocabulary of labels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from trainer.errors import UserError
from trainer.labels import NONE, UNKNOWN
from trainer.stream.config import DataConfig
from trainer.stream.live import Computer, LiveBlocks
from trainer.stream.manifest import Manifest
from trainer.stream.source import BlockSource

SINGLE = ""  # name of the one data set of data.shards
_RESERVED = (NONE, UNKNOWN)  # of trainer.labels, -2 and -1: they index the end of a map


def load_manifests(data: DataConfig, computed: Mapping[str, Manifest] | None = None) -> dict[str, Manifest]:
    """The manifest of each data set by name, in the order of the configuration.

    computed: those of live sources; without them the ones that data.live.manifest names.
    Raises DataError when one is missing, foreign or inconsistent.
    """
    found = {}
    for name, one in ({name: data.of(name) for name in data.sources} or {SINGLE: data}).items():
        if one.live and computed is not None:
            found[name] = computed[name]
            continue
        location = one.live.manifest if one.live else one.shards
        if not location:
            key = f"data.sources.{name}.live" if name else "data.live"
            raise UserError(f"{key} has no manifest before its run begins; name that of a run in {key}.manifest")
        found[name] = Manifest.load(location, allow_pipe=one.allow_pipe, retries=one.retries, timeout=one.timeout)
    return found


class Sources:
    """What the rows of several data sets have in common.

    manifests: by name. first: name of the source whose normalisation the dictionary has; None: the first. computers:
    of live sources, by name. Raises UserError unless widths, dtypes, models and hook points agree; `prefix` stands
    before names there.
    """

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        first: str | None = None,
        prefix: str = "",
        computers: Mapping[str, Computer] | None = None,
    ):
        self.manifests, self.computers = dict(manifests), dict(computers or {})
        self._first = next(iter(manifests)) if first is None else first
        base = self.manifests[self._first]
        for name, manifest in self.manifests.items():
            for key in ("width", "dtype", "model", "hook_point"):
                ours, theirs = getattr(base, key), getattr(manifest, key)
                if ours != theirs and ours and theirs:  # a manifest may leave out where its rows come from
                    raise UserError(
                        f"{prefix}{name} has {key} {theirs}, {prefix}{self._first} has {ours}; "
                        "rows of one dictionary come from one place: extract one of them again"
                    )

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the one source, or that of the first with the vocabularies and the digests of all."""
        base = self.manifests[self._first]
        if SINGLE in self.manifests:
            return base
        digests = {name: manifest.digest for name, manifest in self.manifests.items()}
        return replace(
            base,
            concepts=merged([manifest.concepts for manifest in self.manifests.values()]),
            answers=merged([manifest.answers for manifest in self.manifests.values()]),
            concepts_per_row=max(manifest.concepts_per_row for manifest in self.manifests.values()),
            extra={**base.extra, "sources": digests},
        )

    @cached_property
    def first_rows(self) -> list[int]:
        """Id of the first row of each source: ids count on from one to the next."""
        return np.cumsum([0, *(manifest.rows for manifest in self.manifests.values())])[:-1].tolist()

    def open(self, name: str, config: DataConfig) -> BlockSource:
        """The blocks of a source. config: of all."""
        manifest, computer = self.manifests[name], self.computers.get(name)
        return BlockSource(config.of(name), manifest, LiveBlocks(manifest, computer) if computer else None)

    @property
    def tokens(self) -> int:
        """Tokens that models of this process have read for live sources so far."""
        return sum(computer.tokens for computer in self.computers.values())

    @property
    def rows(self) -> int:
        """Of all of them."""
        return sum(manifest.rows for manifest in self.manifests.values())

    def relabel(self, source: str, labels: np.ndarray, kind: str) -> np.ndarray:
        """Labels of a source, as integers of any shape, in the common vocabulary. kind: concepts or answers."""
        return relabelled(labels, getattr(self.manifests[source], kind), getattr(self.manifest, kind))


def merged(vocabularies: Sequence[Sequence[str]]) -> list[str]:
    """All names, in the order in which they first appear."""
    return list(dict.fromkeys(name for vocabulary in vocabularies for name in vocabulary))


def relabelled(labels: np.ndarray, names: Sequence[str], common: Sequence[str]) -> np.ndarray:
    """Integers that number `names` as numbers of `common`, which has all of them; reserved values stay."""
    if list(names) == list(common)[: len(names)]:
        return labels
    places = {name: place for place, name in enumerate(common)}
    return np.array([*(places[name] for name in names), *_RESERVED], dtype=labels.dtype)[labels]
