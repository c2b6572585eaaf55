"""Tables of documents: what the commands print of the results in docs/figures, character by character."""

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.test_documents import ROOT
from tools.evaluate import shown
from tools.frontiers.points import comparison, table
from tools.reproducing.pages import markdown
from tools.swapping.table import summary
from trainer.files import read_json

# By the first word of a file's name.
PRINTED: dict[str, Callable[[Any], list[str]]] = {
    "swap": lambda found: [summary(found)],
    "frontier": lambda found: [table(found["points"]), comparison(found["compared"])],
    "evaluate": lambda found: [shown(found)],
    "reproduce": lambda found: [markdown(found)],
}
FIGURES = sorted((ROOT / "docs" / "figures").glob("*.json"))


def test_there_are_some() -> None:
    assert FIGURES


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_table_is_what_the_command_prints(path: Path) -> None:
    documents = [dedent(file.read_text(encoding="utf-8")) for file in (ROOT / "docs").glob("*.md")]
    for text in PRINTED[path.stem.partition("-")[0]](read_json(path, dict[str, Any], "write it again")):
        assert any(holds(document, text) for document in documents), f"no document has this table of {path}:\n{text}"


def holds(document: str, text: str) -> bool:
    """Whether the lines of a text stand in a document one after the other, all indented alike or not at all."""
    wanted = text.strip("\n").splitlines()
    return any("\n".join(indent + line if line else line for line in wanted) in document for indent in ("", "    "))
