"""What `alignsae config` does; its arguments and its help are in tools/parsers."""

import argparse
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from trainer.config import Config
from trainer.errors import UserError

HEAD = """# Configuration

Written by `alignsae config --markdown`, from the dataclasses that are configured; a test keeps it so. A configuration
is a YAML file of these keys (see configs/), `key=value` on the command line wins over it, and an unknown key is refused
with the nearest known one. `N` counts the stages from 0,
`NAME` is one that you choose.
"""


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, its default as YAML shows it, what it means."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """Keys that belong together; what they are about."""

    name: str
    about: str
    keys: tuple[Key, ...]


def run(args: argparse.Namespace) -> None:
    """Print."""
    chosen = list(sections())
    if args.names:
        chosen = [narrowed for section in chosen if (narrowed := _narrowed(section, args.names)).keys]
        if not chosen:
            raise UserError(f"no key begins with {' or '.join(args.names)}; `alignsae config` lists all")
    print(markdown(chosen) if args.markdown else plain(chosen), end="")


def sections() -> Iterator[Section]:
    """All sections, the keys of the top level last."""
    comments, hints = meanings(Config), get_type_hints(Config)
    top = []
    for field in fields(Config):
        kind = _dataclass_in(hints[field.name])
        if kind is None:
            top.append(Key(field.name, shown(field), comments.get(field.name, "")))
        else:
            prefix = field.name if kind is hints[field.name] else f"{field.name}.N"
            yield from _section(prefix, kind)
    yield Section("", "Keys of the top level.", tuple(top))


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that a field is, or that a list or dict holds; None where there is none."""
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)


def _section(prefix: str, kind: Any) -> Iterator[Section]:
    comments, hints, keys, inner = meanings(kind), get_type_hints(kind), [], []
    for field in fields(kind):
        deeper = _dataclass_in(hints[field.name])
        if deeper is not None:
            name = f"{prefix}.{field.name}"
            inner.append((f"{name}.NAME" if get_origin(hints[field.name]) is dict else name, deeper))
        if deeper is not hints[field.name]:
            keys.append(Key(f"{prefix}.{field.name}", shown(field), comments.get(field.name, "")))
    about = " ".join((inspect.getdoc(kind) or "").split())
    yield Section(prefix, about, tuple(keys))
    for name, deeper in inner:
        yield from _section(name, deeper)


def shown(field: "Field[Any]") -> str:
    """A field's default, as a configuration spells it."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    return '""' if value == "" else str(value)


def meanings(kind: Any) -> dict[str, str]:
    """Field -> the comment behind it or above it, in a dataclass and those that it extends."""
    found: dict[str, str] = {}
    bases: list[Any] = [base for base in kind.__mro__ if is_dataclass(base)]
    for base in reversed(bases):
        lines = textwrap.dedent(inspect.getsource(base))
        names = [field.name for field in fields(base)]
        held: list[str] = []
        field = ""
        for token in tokenize.generate_tokens(io.StringIO(lines).readline):
            line = token.line.strip()
            if token.type == tokenize.COMMENT:
                text = token.string.lstrip("# ").strip()
                if line.startswith("#") and not field:
                    held.append(text)
                elif field:
                    found[field] = f"{found.get(field, '')} {text}".strip()
            elif token.type == tokenize.NAME and token.start[1] == 4 and token.string in names and ":" in line:
                field = token.string
                if held:
                    found[field] = " ".join(held)
                held = []
            elif token.type == tokenize.NEWLINE:
                field = ""
    return found


def plain(chosen: Sequence[Section]) -> str:
    """For a terminal: as a YAML file would have them, each with its meaning."""
    lines = []
    for section in chosen:
        lines += textwrap.wrap(section.about, 116, initial_indent="# ", subsequent_indent="# ")
        width = min(52, max(len(f"{key.name}={key.default}") for key in section.keys))
        for key in section.keys:
            left = f"{key.name}={key.default}"
            wrapped = textwrap.wrap(key.meaning, max(30, 116 - width))
            lines.append(f"{left:<{width}}  {wrapped[0] if wrapped else ''}".rstrip())
            lines += [" " * (width + 2) + more for more in wrapped[1:]]
        lines.append("")
    return "\n".join(lines)


def markdown(chosen: Sequence[Section]) -> str:
    """As a document, in lines of 120 columns."""
    parts = [HEAD]
    for section in chosen:
        parts.append(f"{'' if len(parts) == 1 else chr(10)}## {section.name or 'Top level'}\n")
        parts.append("\n".join(textwrap.wrap(section.about, 120)) + "\n")
        for key in section.keys:
            text = f"- `{key.name}={key.default}`" + (f": {key.meaning}" if key.meaning else "")
            parts.append("\n".join(textwrap.wrap(text, 118, subsequent_indent="  ", break_on_hyphens=False)))
    return "\n".join(parts) + "\n"


def _narrowed(section: Section, names: Sequence[str]) -> Section:
    kept = tuple(key for key in section.keys if any(key.name.startswith(name) for name in names))
    return Section(section.name, section.about, kept)
