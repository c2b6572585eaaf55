"""What ends a rank, in one line: for people, and for the launcher that started it."""

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.errors import UserError
from trainer.redact import redact
from trainer.topology import launched_world

# Set by `alignsae train`, which prints the line itself, once for all ranks.
QUIET = "ALIGNSAE_LAUNCHED"
GONE = "another rank has gone"
# How gloo, NCCL and the store say that the others did not come, or left.
_LATE = ("timed out", "timeout", "time out")
_LEFT = ("connection closed", "connection reset", "broken pipe", "pair closure", "remote process exited", "aborted")
_FULL = ("can't allocate memory", "not enough memory", "out of memory")


def in_one_line(error: BaseException, timeout: float | None = None) -> str | None:
    """What to tell a user about an error, without a traceback; None for an error that needs one.

    timeout: seconds that ranks wait for each other.
    """
    text = " ".join(str(error).split())
    lower = text.lower()
    if isinstance(error, UserError):
        return redact(str(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in lower for word in _FULL):
        return f"there is not enough memory ({text:.150}); see `alignsae plan` for what a strategy needs per rank"
    if isinstance(error, RuntimeError) and _is_of_a_collective(error):
        if any(word in lower for word in _LEFT):
            return f"{GONE}, {_where(error)}; look for its own message ({text:.150})"
        if any(word in lower for word in _LATE):
            waited = f"parallel.timeout={timeout:g} s" if timeout else "the time limit"
            return (
                f"other ranks did not come within {waited}, {_where(error)}; "
                f"look for one that hangs or is slow ({text:.150})"
            )
    return None


def tell_launcher(error: BaseException, line: str | None) -> None:
    """Leave the line where torchrun and `accelerate launch` look for what happened to a rank; without one, the
    traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    trace = line or "".join(traceback.format_exception(error))
    # As torch.distributed.elastic.multiprocessing.errors.ErrorHandler writes it, whose traceback no caller can choose.
    message = {"message": line or repr(error), "extraInfo": {"py_callstack": trace, "timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": message}))


def exit_with(code: int) -> None:
    """Leave at once when ranks are waiting for each other: a rank that refuses must not hang the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code and launched_world()[2] > 1:
        os._exit(code)
    sys.exit(code)


def _is_of_a_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "processgroup", "peer"))


def _where(error: BaseException) -> str:
    """The collective, and the line of this program that called it."""
    home, call, caller = Path(__file__).parent, "", ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if home in path.parents:
            caller, call = f"{frame.name} ({path.relative_to(home.parent)}:{frame.lineno})", ""
        elif not call and ("distributed" in path.parts or "deepspeed" in path.parts) and frame.name != "wrapper":
            call = frame.name
    return f"in {call} called by {caller}" if call else f"in {caller}"
