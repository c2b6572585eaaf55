"""Label values of foreign samples -> indices."""

import re
from typing import Any

from tools.repacking.samples import check_suffix, kind_of
from trainer.errors import DataError, UserError
from trainer.labels import NONE, UNKNOWN

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_MOST = 1 << 20  # a vocabulary that integers make


class Labels:
    """Label values of one kind -> indices: names are numbered as they appear, or looked up in a fixed vocabulary.

    Args:
        kind: concept or answer.
        source: SUFFIX of a member, or SUFFIX:FIELD of a JSON member.
        names: the fixed vocabulary; None lets it grow.

    Raises UserError for a source that cannot be read.
    """

    def __init__(self, kind: str, source: str, names: list[str] | None):
        self.kind, self.fixed, self.names = kind, names is not None, list(names or [])
        suffix, _, self.field = source.partition(":")
        self.suffix = suffix.lower()
        check_suffix(f"--{kind}", suffix)
        if bool(self.field) != (kind_of(suffix) == "json"):
            raise UserError(
                f"--{kind} {source}: JSON members are read by field, and no others are; write json:FIELD or cls"
            )
        self._index = {name: i for i, name in enumerate(self.names)}
        self._types: set[type] = set()

    def indices(self, member: Any, where: str) -> list[int]:
        """Indices of the labels in a decoded member, of which a JSON field may list several; of an empty list, NONE."""
        value = member.get(self.field) if self.field and isinstance(member, dict) else None
        if not isinstance(value, list):
            return [self.index(member, where)]
        return [self.index({self.field: one}, where) for one in value] or [NONE]

    def index(self, member: Any, where: str) -> int:
        """Index of the label in a decoded member; -1 when it is absent or null."""
        value = self._value(member, where)
        if value is None:
            return UNKNOWN
        self._types.add(type(value))
        if len(self._types) > 1:
            raise UserError(f"{where}: {self.kind} labels mix names and integers")
        if isinstance(value, int):
            least = NONE if self.kind == "concept" else UNKNOWN
            if not least <= value < (len(self.names) if self.fixed else _MOST):
                raise UserError(f"{where}: {self.kind} label {value} is out of range")
            while len(self.names) <= value:
                self.names.append(f"{self.kind}-{len(self.names)}")
            return value
        if value not in self._index:
            if self.fixed:
                raise UserError(f"{where}: {self.kind} {value!r:.60} does not occur in the split given by --like")
            self._index[value] = len(self.names)
            self.names.append(value)
        return self._index[value]

    def _value(self, member: Any, where: str) -> int | str | None:
        if self.field:
            member = member.get(self.field) if isinstance(member, dict) else None
        elif isinstance(member, bytes | str):
            try:
                text = (member.decode() if isinstance(member, bytes) else member).strip()
            except UnicodeDecodeError:
                raise DataError(f"{where}: .{self.suffix} is not UTF-8 text") from None
            member = int(text) if _INTEGER.fullmatch(text) else text or None
        if isinstance(member, bool) or not isinstance(member, int | str | None):
            raise DataError(f"{where}: {self.kind} in .{self.suffix} must be a name, an integer or null")
        return member
