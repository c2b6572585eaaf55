"""What an extraction reads, by document: any of them at any time, names of labels, splits, units of work.

A unit is a run of documents of one split that holds about `--unit-kb` of text. Units depend on the input alone: which
process does one changes nothing about its rows.
"""

import mmap
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.extraction.settings import Settings
from trainer.language_model import SPLITS, Example, json_object, open_data_set, read_example


class JsonLines:
    """The objects of a JSONL file by number, blank lines left out; the file is mapped, not read."""

    def __init__(self, path: Path):
        self.path = path
        self._starts, self._lines = array("q"), array("q")
        try:
            with path.open("rb") as file:
                position = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._starts.append(position)
                        self._lines.append(number)
                    position += len(line)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if position else b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """File and line, for messages."""
        return f"{self.path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self._starts[index]
        end = self._map.find(b"\n", start)
        return json_object(self._map[start : end if end >= 0 else None], self.where(index))


class SavedRows:
    """The rows of a folder that `datasets` reads, by number."""

    def __init__(self, path: Path):
        self.path, self._rows = path, open_data_set(path)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """Folder and row, for messages."""
        return f"{self.path}:{index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


@dataclass
class Documents:
    """The input: `read(i)` gives document i. units[split][u] lists the documents of unit u, in input order, and
    sizes[split][u] is how many characters they have.

    concepts, answers: names in the order of first appearance, or concepts as --concepts lists them. token_position: at
    which tokens the rows are.
    """

    read: Callable[[int], Example]
    where: Callable[[int], str]
    item: str  # prompt, text or row
    units: dict[str, list[array]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    concepts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    token_position: str = ""


def unit_name(split: str, number: int) -> str:
    """Name of a unit, with which the keys of its blocks begin."""
    return f"{split}-{number:06d}"


def unit_of(key: str) -> int:
    """Number of the unit that a block with this key is of; -1 where that is no key of an extraction."""
    found = re.fullmatch(r"[a-z]+-(\d{6,})-\d{6}-\d{6}", key)
    return int(found[1]) if found else -1


def open_documents(settings: Settings) -> Documents:
    """Read the whole input once: everything that is wrong with a row is found before the model runs. UserError."""
    path = settings.input
    rows = SavedRows(path) if path.is_dir() else JsonLines(path)

    def example(index: int) -> Example:
        if settings.prompts:
            return read_example(rows[index], rows.where(index))
        row = rows[index]
        if not isinstance(row.get(settings.field), str):
            found = ", ".join(sorted(row)) or "none"
            raise UserError(f"{rows.where(index)}: no text field {settings.field!r}; found {found}")
        return Example(text=row[settings.field])

    found = Documents(example, rows.where, "row" if settings.prompts else "text")
    found.units, found.sizes = {split: [] for split in SPLITS}, {split: [] for split in SPLITS}
    concepts: dict[str, None] = {}
    answered: list[tuple[tuple[str, ...] | None, str]] = []
    positions: dict[str, None] = {}
    for index in range(len(rows)):
        document = example(index)
        split = document.split or (
            "heldout" if settings.heldout and index % settings.heldout == settings.heldout - 1 else "train"
        )
        units, sizes = found.units[split], found.sizes[split]
        if not sizes or sizes[-1] >= settings.unit_kb << 10:
            units.append(array("q"))
            sizes.append(0)
        units[-1].append(index)
        sizes[-1] += len(document.prompt) + len(document.text) + sum(len(m.content) for m in document.messages)
        positions["every token of a text" if document.text else "last prompt token"] = None
        concepts.update(dict.fromkeys(document.names or ()))
        concepts.update(dict.fromkeys(span.concept for span in document.spans or ()))
        if document.answer:
            answered.append((document.names, document.answer))
    if not found.units["train"]:
        what = "no row of split 'train', which the normalisation is computed from" if len(rows) else "no rows"
        raise UserError(f"{path} holds {what}")
    found.token_position = "; ".join(sorted(positions))
    found.concepts = choose_concepts(list(concepts), settings.concepts)
    chosen = set(found.concepts)
    # The answer of a row that loses its label to --concepts is left out with it.
    kept = (answer for names, answer in answered if not names or chosen.intersection(names))
    found.answers = list(dict.fromkeys(kept))
    return found


def choose_concepts(found: list[str], names: str | None) -> list[str]:
    """Concept names in slot order. UserError when --concepts names one that no row has, or one twice."""
    if names is None:
        return found
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in found:
            near = get_close_matches(name, found, n=1, cutoff=0) or [""]
            raise UserError(f"--concepts: no prompt has concept {name!r}; the nearest one is {near[0]!r}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--concepts {names}: a name occurs twice")
    return chosen
