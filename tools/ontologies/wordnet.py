"""Nouns of WordNet as a tree of concepts with words of their own.

Read are data.noun, index.noun and cntlist.rev of WordNet 3 (their formats: wndb(5WN) and cntlist(5WN)). A synset's
parent is its first hypernym, so that every noun has one path to the root; names of persons and places (instances) are
left out. A word belongs to the synset of its most frequent sense alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.errors import UserError


@dataclass
class Synset:
    """A meaning, and how often each of its words was met in tagged texts."""

    name: str
    parent: int | None  # offset of the first hypernym
    words: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Concept:
    """A chosen synset. `words` are those that belong to no chosen synset below it, the most usual first; `ancestors`
    are the names of the chosen synsets above it, the nearest first."""

    name: str
    words: list[str]
    ancestors: list[str]


def read_nouns(folder: Path) -> dict[int, Synset]:
    """Synsets by offset. Raises UserError where the files are missing or are something else."""
    try:
        synsets = dict(_synsets(_lines(folder / "data.noun")))
        counts = _counts(_lines(folder / "cntlist.rev"))
        for line in _lines(folder / "index.noun"):
            # lemma pos synset_cnt p_cnt [pointers] sense_cnt tagsense_cnt offset ..., the most frequent sense first
            lemma, _, senses, *rest = line.split()
            first = int(rest[-int(senses)])
            if lemma.replace("_", "").isalpha() and lemma.islower() and first in synsets:
                synsets[first].words[lemma.replace("_", " ")] = counts.get(lemma, 0)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: --wordnet names WordNet's folder of data.noun") from error
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{folder} holds no nouns of WordNet 3 ({error})") from error
    return synsets


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if not line.startswith("  "))  # the licence


def _synsets(lines: Iterable[str]) -> Iterator[tuple[int, Synset]]:
    # offset lex_filenum n w_cnt(hex) (word lex_id)* p_cnt (symbol offset pos source/target)* | gloss
    for line in lines:
        parts = line.partition(" | ")[0].split()
        words = int(parts[3], 16)
        pointers = parts[4 + 2 * words :]
        kinds = [pointers[1 + 4 * i] for i in range(int(pointers[0]))]
        if "@i" in kinds:
            continue
        parent = int(pointers[2 + 4 * kinds.index("@")]) if "@" in kinds else None
        yield int(parts[0]), Synset(parts[4].replace("_", " "), parent)


def _counts(lines: Iterable[str]) -> dict[str, int]:
    """How often the first sense of a noun was met."""
    counts = {}
    for line in lines:
        key, sense, count = line.split()
        lemma, _, rest = key.partition("%")
        if rest.startswith("1:") and sense == "1":
            counts[lemma] = int(count)
    return counts


def choose_concepts(synsets: dict[int, Synset], concepts: int, words: int, depth: int) -> list[Concept]:
    """The `concepts` most usual synsets with at least `words` words of their own, in order of name.

    From the leaves up a synset with that many words, of itself and of those below that belong to nothing yet, takes
    them and becomes a concept. Synsets less than `depth` steps from the root are too wide to be one. Of those found the
    ones are kept whose words were met most often; the others give their words to nobody.

    Raises UserError when there are fewer than asked for.
    """
    chains = {offset: list(_chain(synsets, offset)) for offset in synsets}
    free = {offset: dict(synset.words) for offset, synset in synsets.items()}
    found: dict[int, dict[str, int]] = {}
    for offset in sorted(synsets, key=lambda o: (-len(chains[o]), o)):
        if len(chains[offset]) <= depth:
            continue
        if len(free[offset]) >= words:
            found[offset] = free[offset]
        elif len(chains[offset]) > 1:
            free[chains[offset][1]] |= free[offset]
    if len(found) < concepts:
        raise UserError(
            f"there are {len(found)} concepts with at least {words} words, not {concepts}; ask for fewer of either"
        )
    kept = sorted(sorted(found, key=lambda o: (-sum(found[o].values()), o))[:concepts])
    names = _distinct([synsets[o].name for o in kept])
    named = dict(zip(kept, names, strict=True))
    chosen = [
        Concept(
            named[o],
            [word for _, word in sorted((-met, word) for word, met in found[o].items())],
            [named[a] for a in chains[o][1:] if a in named],
        )
        for o in kept
    ]
    return sorted(chosen, key=lambda c: c.name)


def _chain(synsets: dict[int, Synset], offset: int) -> Iterator[int]:
    """A synset and all above it, up to the root; one that is not there ends the chain."""
    seen: set[int] = set()
    at: int | None = offset
    while at is not None and at in synsets and at not in seen:
        seen.add(at)
        yield at
        at = synsets[at].parent


def _distinct(names: list[str]) -> list[str]:
    """Names with a number where one came before."""
    count: dict[str, int] = {}
    for i, name in enumerate(names):
        count[name] = count.get(name, 0) + 1
        if count[name] > 1:
            names[i] = f"{name} {count[name]}"
    return names
