"""Files are written whole or not at all, and JSON is read with suspicion: bounded, strict, checked against a type.

What a type cannot say goes into `Meta(extra=wrong("..."))`: the sentence, with {field} and {value}, that a reader sees.
"""

import errno
import json
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import inspect

from trainer.errors import DataError, UserError

T = TypeVar("T")
MAX_JSON = 64 << 20  # bytes; far more than that is no file of names and numbers of ours


def wrong(sentence: str) -> dict[str, str]:
    """`extra` of a Meta: what to say of a value that is not of the type; {field} and {value} are filled in."""
    return {"wrong": sentence}


def whole(low: int, high: int) -> msgspec.Meta:
    """Constraint of an int: low..high (64-bit numbers)."""
    return msgspec.Meta(
        ge=low, le=high, extra=wrong(f"field {{field}}={{value}} is no whole number or outside {low}..{high}")
    )


Count = Annotated[int, whole(0, 1 << 62)]


def write_atomically(path: Path, payload: bytes) -> Path:
    """Write a file under a temporary name, fsync, rename; on any error nothing is left behind. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write JSON as `write_atomically` does. Raises OSError, and ValueError for NaN and infinity, which JSON lacks."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return write_atomically(path, text.encode() + b"\n")


def write_result(path: Path, content: str | bytes | dict[str, Any]) -> None:
    """Write what a user asked for, a dict as JSON, and make its folder. Raises UserError when the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            write_json(path, content)
        else:
            write_atomically(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another place") from error


def allow_as_umask(folder: Path) -> None:
    """Give every file in `folder` the mode that the umask gives new files: safetensors makes its own 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def read_regular(path: Path, limit: int = MAX_JSON) -> bytes:
    """All bytes of a regular file. Raises OSError, also for a pipe, device or folder, and beyond `limit` bytes."""
    # Without O_NONBLOCK opening a named pipe waits for its writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        payload = file.read(limit + 1)
    if len(payload) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return payload


def parse_json(text: bytes | str) -> Any:
    """The value of strict JSON. Raises ValueError, one line; also for NaN, 1e999, lone surrogates and depth."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(_line(str(error))) from None


def read_json(path: Path, kind: type[T], remedy: str, *, name: str = "", limit: int = MAX_JSON) -> T:
    """The JSON value of a file, as a value of type `kind`.

    remedy: what to do when it cannot be used. name: what to call the file, its path by default. Raises DataError, one
    line.
    """
    name = name or str(path)
    try:
        value = parse_json(read_regular(path, limit))
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise DataError(f"{name} is not JSON ({error}); {remedy}") from error
    try:
        return checked(value, kind)
    except ValueError as error:
        raise DataError(f"{name}: {error}; {remedy}") from error


def checked(value: Any, kind: type[T]) -> T:
    """A parsed JSON value as a value of type `kind`, a dataclass, say. Raises ValueError, one line, with the field."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_line(_sentence(str(error), value, kind))) from None


_PLACE = re.compile(r"(?P<what>.*?)(?: - at `(?:key` in `)?\$(?P<place>.*)`)?\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`\Z")
_PART = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_UNKNOWN = object()


def _sentence(message: str, value: Any, kind: type) -> str:
    """msgspec's message in the words of the type that was missed, with the value that missed it."""
    found = _PLACE.match(message)
    what, place = (found["what"], found["place"] or "") if found else (message, "")
    expected = inspect.type_info(kind)
    for name, index in _PART.findall(place):
        expected, value = _inner(expected, name or index), _item(value, name or index)
    field = place.lstrip(".")
    if missing := _MISSING.match(what):
        listed = f"; found {', '.join(sorted(map(str, value))) or 'none'}" if isinstance(value, dict) else ""
        return f"no field {missing[1]!r}{f' in {field}' if field else ''}{listed}"
    sentence = expected.extra and expected.extra.get("wrong") if isinstance(expected, inspect.Metadata) else None
    if sentence:
        return sentence.format(field=field, value=_shown(value))
    return f"field {field}={_shown(value)}: {what}" if field else what


def _inner(expected: Any, part: str) -> Any:
    """The type of a field or item of a type; `part` is a name, an index, or `...` for any key of a dict."""
    if isinstance(expected, inspect.Metadata):
        return _inner(expected.type, part)
    if isinstance(expected, inspect.UnionType):
        inner = (_inner(option, part) for option in expected.types)
        return next((found for found in inner if found is not _UNKNOWN), _UNKNOWN)
    if isinstance(expected, inspect.DataclassType | inspect.TypedDictType):
        return next((f.type for f in expected.fields if f.encode_name == part), _UNKNOWN)
    if isinstance(expected, inspect.ListType | inspect.VarTupleType):
        return expected.item_type
    if isinstance(expected, inspect.TupleType):
        return expected.item_types[int(part)]
    return expected.value_type if isinstance(expected, inspect.DictType) else _UNKNOWN


def _item(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return value.get(part, _UNKNOWN)
    return value[int(part)] if isinstance(value, list) and part.isdigit() else _UNKNOWN


class _Short(reprlib.Repr):
    """Values as they are shown: short, and without the digits of a number of thousands of them."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"


def _shown(value: Any) -> str:
    return "..." if value is _UNKNOWN else _Short().repr(value)


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:397]}..."
