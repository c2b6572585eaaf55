"""The files of the pages: one page, its script and style, and the data of slots in parts that it loads when they are
asked for.

Data are calls of a function in script files, not JSON that is fetched: a browser opens them from a folder too. What a
page shows of them it puts in as text, never as markup.
"""

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

PART = 200_000  # bytes of a part, about
ASSETS = ("base.css", "explore.css", "explore.js")


class Parts:
    """Script files FOLDER/NAME-00000.js ..., each a call `alignsae.NAME([...])` with items."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.count = 0
        self._held: list[str] = []
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, item: Any) -> int:
        """Add an item; the number of the part that it is in."""
        text = script(item)
        size = len(text.encode())
        if self._held and self._bytes + size > PART:
            self.close()
        self._held.append(text)
        self._bytes += size
        return self.count

    def close(self) -> None:
        """Write what is held."""
        if self._held:
            body = f"alignsae.{self.name}({self.count},[\n" + ",\n".join(self._held) + "\n]);\n"
            (self.folder / f"{self.name}-{self.count:05d}.js").write_text(body, encoding="utf-8")
            self.count += 1
        self._held, self._bytes = [], 0


def script(value: Any) -> str:
    """JSON that a script may hold: no line separators of JavaScript, and nothing that ends a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter, escaped in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(letter, escaped)
    return text


def write(folder: Path, about: dict[str, Any], slots: Iterable[tuple[list[Any], dict[str, Any]]]) -> dict[str, int]:
    """Write all files.

    about: what the head of the page says. slots: of each slot its line of the table and its details, in order; the
    number of the part with the details is appended to the line. Returns how many parts there are of each.
    """
    details, lines = Parts(folder / "data", "details"), Parts(folder / "data", "lines")
    for line, detail in slots:
        lines.add([*line, details.add(detail)])
    details.close()
    lines.close()
    environment = Environment(loader=PackageLoader("tools"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("explore.html").render(about=about, parts=lines.count)
    (folder / "index.html").write_text(page, encoding="utf-8")
    for name in ASSETS:
        text = files("tools").joinpath("templates", name).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")
    return {"lines": lines.count, "details": details.count}
