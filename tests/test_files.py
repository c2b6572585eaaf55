"""Files that are written whole or not at all, and JSON that is read with suspicion."""

import json
import math
import os
import socket
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import DataError
from trainer.files import (
    Count,
    allow_as_umask,
    checked,
    parse_json,
    read_json,
    read_regular,
    write_atomically,
    write_json,
    wrong,
)


class Size(TypedDict, total=False):
    """A part, named by its keys."""

    rows: Count


@dataclass
class Part:
    """A part, named by its fields."""

    name: Annotated[str, msgspec.Meta(pattern=r"\A[a-z]+\Z", extra=wrong("{field} {value} is no lower-case name"))]
    span: tuple[Count, Count] | None = None
    kind: Literal["a", "b"] = "a"


@dataclass
class Whole:
    """Something of parts."""

    parts: list[Part]
    size: Size = field(default_factory=Size)
    counts: dict[str, Count] = field(default_factory=dict)
    ratio: float = 0.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "Expected `object`, got `array`"),
        ({}, "no field 'parts'; found none"),
        ({"parts": 3}, "field parts=3: Expected `array`, got `int`"),
        ({"parts": [{"name": "x"}, {"nome": "x"}]}, "no field 'name' in parts[1]; found nome"),
        ({"parts": [{"name": "X"}]}, "parts[0].name 'X' is no lower-case name"),
        ({"parts": [{"name": 7}]}, "parts[0].name 7 is no lower-case name"),
        ({"parts": [{"name": "x", "span": [1, -2]}]}, "field parts[0].span[1]=-2 is no whole number or outside 0.."),
        ({"parts": [{"name": "x", "span": [1, True]}]}, "field parts[0].span[1]=True is no whole number"),
        ({"parts": [{"name": "x", "span": [1, 2, 3]}]}, "field parts[0].span=[1, 2, 3]: Expected `array` of length 2"),
        ({"parts": [{"name": "x", "kind": "c"}]}, "field parts[0].kind='c': Invalid enum value"),
        ({"parts": [], "size": {"rows": 10**400}}, "field size.rows=a number of 1329 bits is no whole number"),
        ({"parts": [], "counts": {"a\nb": -1}}, "field counts[...]=... is no whole number"),
        ({"parts": [], "ratio": 10**400}, "field ratio=a number of 1329 bits: Number out of range"),
        ({"parts": [{"name": "y" * 10**6 + "\n"}]}, "parts[0].name 'yyyy"),
        ({f"{'k' * 10**6}\n": 1}, "no field 'parts'; found kkk"),
    ],
)
def test_what_is_wrong_is_named_in_one_short_line(value: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        checked(value, Whole)
    text = str(caught.value)
    assert text.startswith(message) and len(text) <= 400 and "\n" not in text


def test_a_value_of_the_type_is_converted_and_what_is_not_of_it_is_left_out() -> None:
    value = {"parts": [{"name": "x", "span": [1, 2], "more": 1}], "size": {"rows": 4}, "ratio": 2}
    assert checked(value, Whole) == Whole([Part("x", (1, 2))], {"rows": 4}, {}, 2.0)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(_JSON)
def test_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    """Types and floats to the last bit: a manifest's digest is of what was read."""
    text = json.dumps(value)
    assert repr(parse_json(text)) == repr(json.loads(text)) == repr(parse_json(text.encode()))


@given(_JSON)
def test_any_value_of_any_type_is_converted_or_refused_in_one_line(value: Any) -> None:
    for kind in (Whole, Part, Size, dict[str, Count], list[Part]):
        for content in (value, {"parts": value}, {"parts": [value], "size": value}, {"name": value}, {"rows": value}):
            try:
                checked(content, kind)
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) <= 400


@pytest.mark.parametrize(
    "text", [b"", b"{", b"NaN", b"-Infinity", b"1e999", b"[" * 10**6, b'"\\ud800"', b"\xff", b"9" * 5000, b"{}x"]
)
def test_what_is_no_json_is_refused_in_one_line(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=r"x\.json is not JSON \(.*\); try again") as caught:
        read_json(path, Any, "try again")
    assert "\n" not in str(caught.value)


def special_files(folder: Path) -> list[Path]:
    """A named pipe, a socket, a folder, an endless device."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "folder").mkdir()
    return [folder / "pipe", folder / "socket", folder / "folder", Path("/dev/zero"), folder / "none"]


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    found: list[str] = []

    def read_all() -> None:
        for path in special_files(tmp_path):
            with pytest.raises(DataError, match="cannot be read") as caught:
                read_json(path, Any, "try again")
            found.append(str(caught.value))

    thread = threading.Thread(target=read_all, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), f"waits after {found}"
    assert len(found) == 5


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]" + " " * 7)
    assert read_json(path, list[int], "", limit=10) == [1]
    with pytest.raises(DataError, match="larger than 9 bytes"):
        read_json(path, Any, "", limit=9)
    assert read_regular(path) == path.read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, "é"]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, "é"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, b"new")
    assert json.loads(path.read_text()) == {"a": [1, 2.5, "é"]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        (tmp_path / "deep").mkdir()
        private = tmp_path / "deep" / "weights"
        private.touch(mode=0o600)
        write_atomically(tmp_path / "x", b"")
        allow_as_umask(tmp_path)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (private, tmp_path / "x")] == [0o640, 0o640]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "x"]
