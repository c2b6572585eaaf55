"""Starting ranks as `accelerate launch` does, but so that their exit code and their one line come through."""

import io
import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import FrameType

from trainer.errors import UserError
from trainer.failures import GONE, QUIET


def start(options: Sequence[str], arguments: Sequence[str]) -> tuple[int, str]:
    """Run `accelerate launch OPTIONS -m trainer.train ARGUMENTS` to its end.

    Returns the exit code of the rank that failed first (0 for none), and what it said; "" where it printed that itself.
    Raises UserError for options that accelerate does not take.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parsed = launch_command_parser().parse_args([*options, "-m", "trainer.train", *arguments])
    except SystemExit:
        last = (said.getvalue().strip().splitlines() or ["they cannot be read"])[-1]
        raise UserError(f"options of accelerate launch: {last.rpartition('error: ')[2]}") from None
    os.environ[QUIET] = "1"
    logging.disable(logging.ERROR)  # of the launcher: what it logs about a rank that failed is in the line
    try:
        with _passing_signals_on():
            launch_command(parsed)
        return 0, ""
    except subprocess.CalledProcessError as error:  # one process; it printed its line
        return _code(error.returncode), ""
    except ChildFailedError as error:
        return _first(error)
    except SignalException as error:
        return 128 + int(
            error.sigval
        ), f"ended by {signal.Signals(error.sigval).name}; outcome.json says how far it came"
    except (ValueError, ImportError, RuntimeError, KeyError, AssertionError) as error:
        raise UserError(f"accelerate launch: {' '.join(str(error).split()):.300}") from error
    finally:
        logging.disable(logging.NOTSET)
        os.environ.pop(QUIET, None)


def _first(error: object) -> tuple[int, str]:
    """Exit code and words of the failure that caused the others."""
    failures = [failure for _, failure in sorted(error.failures.items())]  # type: ignore[attr-defined]
    failure = min(failures, key=lambda failure: (_follows(failure), failure.timestamp))
    leaves = failure.exitcode in (75, 130)  # saved and left: the run has said why
    return _code(failure.exitcode), "" if leaves else _words(failure)


def _follows(failure: object) -> int:
    """How likely a failure is only what another one brought about; 0: not at all.

    The launcher ends all ranks when one has failed.
    """
    code = failure.exitcode  # type: ignore[attr-defined]
    if isinstance(failure.message, dict):  # type: ignore[attr-defined]
        return 3 if GONE in _words(failure) else 0
    return 4 if code == -signal.SIGTERM else 1 if code < 0 else 2


def _words(failure: object) -> str:
    message = failure.message  # type: ignore[attr-defined]
    if isinstance(message, dict):
        return str(message.get("extraInfo", {}).get("py_callstack") or message.get("message", ""))
    exitcode, rank = failure.exitcode, failure.local_rank  # type: ignore[attr-defined]
    if exitcode < 0:
        return f"local rank {rank} was ended by {signal.Signals(-exitcode).name}"
    return f"local rank {rank} left with exit code {exitcode}; see its messages above"


def _code(code: int) -> int:
    """As a shell gives it."""
    return 128 - code if code < 0 else code


@contextmanager
def _passing_signals_on() -> Iterator[None]:
    """SIGTERM and SIGUSR1 go on to what this process started; Ctrl-C reaches it from the terminal anyway."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for thread in Path("/proc/self/task").iterdir():
            for child in (thread / "children").read_text().split():
                os.kill(int(child), number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
