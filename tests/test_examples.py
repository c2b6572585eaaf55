"""The scripts of examples/ run, and from nothing to steered text it is no more than eight lines."""

import ast
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python examples/NAME ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_steered_text(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("steer.py", tiny_run / "aligned", tiny_run / "lm", "Q bob city", "work", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "Q bob city" in out and "'work': tensor" in out
    text = (EXAMPLES / "steer.py").read_text()
    end = ast.parse(text).body[0].end_lineno
    lines = [line for line in text.splitlines()[end:] if line.strip()]
    assert len(lines) <= 8


def test_read(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("read.py", tiny_run / "aligned", tiny_run / "data" / "train", monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "12 rows" in out and "city: active on" in out


def test_every_example_is_run() -> None:
    tests = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tests for path in EXAMPLES.glob("*.py"))
