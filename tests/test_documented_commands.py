"""Commands in documents and in the help of commands: each is one that the parsers take, with settings that exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_documents import ROOT, documents, tracked
from tools.cli import TOOLS, build_parser
from trainer.config import load_config


def lines(text: str) -> Iterator[str]:
    """Lines of code blocks, fenced or indented, with those joined that a backslash continues, without comments."""
    fenced, joined = False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("  "):
            joined += line.strip()
            if joined.endswith("\\"):
                joined = joined[:-1].rstrip() + " "
                continue
            yield joined
            joined = ""


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command of this program in a text; what has options in brackets or ends in `...` is a pattern of
    one, and a name followed by two spaces begins a table."""
    for line in lines(text):
        if not re.search(r"(?:^| )(?:alignsae [a-z-]+ (?! )|-m trainer\.train |-m tools\.cli )", line):
            continue
        words = shlex.split(line, comments=True)
        if any(word == "..." or word.startswith("[--") or word in ("|", "&&") for word in words):
            continue
        yield words


def documented() -> list[tuple[str, list[str]]]:
    """(where, words) of every command of README.md, docs/ and the help of the commands."""
    texts = {str(path): (ROOT / path).read_text(encoding="utf-8") for path in documents(tracked(ROOT))}
    for module, _ in TOOLS.values():
        path = f"tools/parsers/{module}.py"
        texts[path] = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return [(f"{name}: {shlex.join(words)}", words) for name, text in texts.items() for words in commands(text)]


FOUND = documented()


def test_they_are_found() -> None:
    assert len(FOUND) > 60
    assert {"train", "extract", "swap", "evaluate", "frontier"} <= {word for _, words in FOUND for word in words}


@pytest.mark.parametrize("words", [words for _, words in FOUND], ids=[where for where, _ in FOUND])
def test_a_command_is_one_that_the_parsers_take(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if "trainer.train" in words:
        given = words[words.index("trainer.train") + 1 :]
    else:
        begin = words.index("alignsae") if "alignsae" in words else words.index("tools.cli")
        name, *rest = words[begin + 1 :]
        args = build_parser(name).parse_args([name, *rest])
        if name != "train":
            return
        given = ["--config", args.config, *args.overrides]
    config, overrides = given[given.index("--config") + 1], [word for word in given if re.match(r"[a-z_.0-9]+=", word)]
    if Path(config).is_file():
        load_config(config, overrides)


def test_tests_that_documents_name_are_there() -> None:
    named = [
        shlex.split(command)
        for path in documents(tracked(ROOT))
        for command in re.findall(r"`pytest ([^`]+)`", (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert len(named) > 5
    for words in named:
        (place,) = [ROOT / word for word in words if word.startswith("tests/")]
        files = [place] if place.is_file() else sorted(place.glob("test_*.py"))
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        names = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
        assert any(words[words.index("-k") + 1] in name if "-k" in words else name for name in names), words
        assert "-m" not in words or f"mark.{words[words.index('-m') + 1]}" in text, words
