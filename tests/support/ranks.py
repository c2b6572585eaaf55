"""Ranks of a job: real processes that meet over gloo, ended and reported together.

    outputs = run_ranks(2, train_rank, ["--config", "small.yaml", "parallel.strategy=zero3"])

Importing torch, Accelerate and DeepSpeed takes longer than a small run does, so ranks are forked from one process that
has imported them (the standard library's forkserver). Where the start itself is what a test is about, commands.py
starts programs as users do.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Self

# What trainers import on their way, the parts that DeepSpeed and torch.optim import at their first use included.
PRELOADED = [
    "pytest",
    "trainer.train",
    "accelerate",
    "deepspeed",
    "deepspeed.module_inject.auto_tp",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "transformers.integrations.deepspeed",
]
LIMIT = 300.0  # seconds that a job may take
GRACE = 10.0  # seconds that the other ranks have to end when one has failed
LAUNCHERS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Ended:
    """How a job ended: by rank its exit code (negative: the signal that ended it) and all that it wrote."""

    codes: list[int]
    outputs: list[str]

    def report(self) -> str:
        """The last lines, a traceback where there is one, of every rank that failed."""
        failed = [(rank, code) for rank, code in enumerate(self.codes) if code]
        return "\n".join(
            f"rank {rank} of {len(self.codes)} ended with {code}:\n{self.outputs[rank][-6000:]}"
            for rank, code in failed
        )


class Ranks:
    """`world` processes that call `function(*args)`; a context that leaves none of them behind.

    `function` must be importable (defined at the top of a module); what it returns is the exit code. It sees the
    variables that a launcher sets (none of them where there is one rank), `env`, and otherwise the caller's
    environment.
    """

    def __init__(
        self, world: int, function: Callable[..., int | None], *args: object, env: Mapping[str, str] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._logs = [Path(self._folder.name) / f"rank-{rank}.txt" for rank in range(world)]
        common = clean_environment() | dict(env or {})
        if world > 1:
            port = str(free_port())
            common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._ranks = []
        for rank, log in enumerate(self._logs):
            own = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
            process = _processes.Process(target=_rank, args=(str(log), own, function, args), daemon=True)
            process.start()
            self._ranks.append(process)
        self.pids = [process.pid or 0 for process in self._ranks]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._folder.cleanup()

    @property
    def running(self) -> bool:
        """Whether all ranks live."""
        return all(process.is_alive() for process in self._ranks)

    def kill(self) -> None:
        """End the ranks that live by SIGKILL."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()

    def wait(self, timeout: float = LIMIT) -> Ended:
        """Wait for all ranks. Who is left when one has failed or time is up says where it stood and is ended."""
        deadline, failed = time.monotonic() + timeout, False
        while living := [process.sentinel for process in self._ranks if process.is_alive()]:
            if not failed and any(process.exitcode for process in self._ranks):
                deadline, failed = min(deadline, time.monotonic() + GRACE), True
            if not wait(living, max(0.0, deadline - time.monotonic())):
                break
        for process in self._ranks:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGABRT)  # faulthandler writes the traceback of every thread
                process.join(5)
        self.kill()
        outputs = [log.read_text(errors="replace") if log.exists() else "" for log in self._logs]
        return Ended([process.exitcode or 0 for process in self._ranks], outputs)


def run_ranks(
    world: int,
    function: Callable[..., int | None],
    *args: object,
    timeout: float = LIMIT,
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """What each of `world` ranks that called `function(*args)` wrote. Fails with the tracebacks of those that fail."""
    with Ranks(world, function, *args, env=env) as ranks:
        ended = ranks.wait(timeout)
    assert not any(ended.codes), ended.report()
    return ended.outputs


def clean_environment() -> dict[str, str]:
    """This process's environment with one thread and without what a launcher sets."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_VARIABLES}
    return kept | {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(log: str, env: dict[str, str], function: Callable[..., int | None], args: tuple[object, ...]) -> None:
    """The life of a rank."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(env)
    sys.exit(function(*args) or 0)
