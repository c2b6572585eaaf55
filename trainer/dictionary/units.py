"""Names of units: the parts of a dictionary that checkpoints and engines handle one by one."""

import re

CONCEPTS, OUTPUT, VALUE = "concepts", "output", "value"
_BANK = re.compile(r"bank-(\d{5,})\Z")


def bank_unit(number: int) -> str:
    """Name of free bank `number`: bank-00000, bank-00001 ..."""
    return f"bank-{number:05d}"


def bank_number(unit: str) -> int | None:
    """Number of the free bank that a unit's name stands for; None for the units that are no free bank."""
    match = _BANK.match(unit)
    return int(match[1]) if match else None
