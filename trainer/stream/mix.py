"""From the mix of a stage to whole rows of a lane."""

import math
from collections.abc import Mapping, Sequence

from trainer.errors import UserError
from trainer.stream.plan import check_batch

ROUNDING = 1e-6  # of a share: what is written with six digits


def lane_rows(
    mix: Mapping[str, float], sources: Sequence[str], global_batch: int, lanes: int, where: str
) -> dict[str, int]:
    """Rows that a lane takes of each source in a step, in the order of the mix, sources without rows left out.

    mix: source -> share of the global batch; empty: all of it from the one source that there is. where: key of the mix.
    Raises UserError for an unknown source, shares that are negative or do not add up to 1, and a share that gives a
    lane no whole number of rows; it names the nearest mix that goes.
    """
    check_batch(global_batch, lanes)
    rows = global_batch // lanes
    if not mix and len(sources) > 1:
        raise UserError(f"{where} is missing; say how much of a batch comes from {', '.join(sources)}")
    if not mix:
        return {sources[0]: rows}
    for name, share in mix.items():
        if name not in sources:
            there = f"data.sources has {', '.join(sources)}" if any(sources) else "data.sources is empty"
            raise UserError(f"{where} names {name!r:.60}, but {there}")
        if not 0 <= share <= 1 + ROUNDING:
            raise UserError(f"{where}.{name}={share} must be between 0 and 1")
    total = sum(mix.values())
    if not total:
        raise UserError(f"{where} is 0 for every source; shares add up to 1")
    whole = _nearest({name: share / total for name, share in mix.items() if share}, rows)
    off = {name: abs(share - whole.get(name, 0) / rows) for name, share in mix.items()}
    if abs(total - 1) > ROUNDING * len(mix) or max(off.values()) > ROUNDING:
        problem = f"adds up to {total:g}, not 1"
        if abs(total - 1) <= ROUNDING * len(mix):
            problem = f"gives each of data.lanes={lanes} lanes {_listed(mix, rows)} of its {rows} rows, not whole ones"
        raise UserError(f"{where} {problem}; {_remedy(whole, rows, global_batch, lanes)}")
    return whole


def _nearest(shares: Mapping[str, float], rows: int) -> dict[str, int]:
    """Whole numbers that add up to `rows`, by largest remainder."""
    whole = {name: math.floor(share * rows + ROUNDING * rows) for name, share in shares.items()}
    for name in sorted(shares, key=lambda name: whole[name] - shares[name] * rows)[: rows - sum(whole.values())]:
        whole[name] += 1
    return whole


def _remedy(whole: Mapping[str, int], rows: int, global_batch: int, lanes: int) -> str:
    """What goes instead."""
    if min(whole.values()) < 1:
        return f"raise data.global_batch={global_batch} or lower data.lanes={lanes}, so that a lane has more rows"
    return f"the nearest that goes is {{{', '.join(f'{name}: {n / rows:.7g}' for name, n in whole.items())}}}"


def _listed(mix: Mapping[str, float], rows: int) -> str:
    return " and ".join(f"{share * rows:g}" for share in mix.values())
