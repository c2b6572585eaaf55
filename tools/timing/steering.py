"""What steering adds to a step of generation."""

import time
from collections.abc import Callable
from typing import Any

from tools.timing.rounds import Rounds, Subject


def overhead(plain: Callable[[], Any], steered: Callable[[], Any], tokens: int, repeats: int, device: str) -> str:
    """One line: a step without and with steering, medians of calls in turns that generate `tokens` tokens each.

    On a CPU it is CPU time, which a busy machine disturbs less.
    """
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    found = Rounds(repeats, clock).measure({"plain": Subject(plain), "steered": Subject(steered)}, device)
    before, after = (1000 * found[name].median / tokens for name in ("plain", "steered"))
    kind = "time" if device.startswith("cuda") else "CPU time"
    return (
        f"{kind} of a generated token: {before:.2f} ms, steered {after:.2f} ms ({after / before - 1:+.1%}; medians of "
        f"{repeats} turns of {tokens} tokens)"
    )
