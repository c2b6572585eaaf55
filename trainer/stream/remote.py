"""Fetching bytes from wherever a data set lives: the only home of fsspec. No message holds a credential or a signature.

A function here makes one attempt within its Deadline; the backends' own retries are switched off, since `retried` is
the one that tries again.
"""

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from trainer import private
from trainer.errors import DataError, UserError
from trainer.redact import redact
from trainer.stream.attempts import Deadline, Refused, Unreachable, retried
from trainer.stream.location import check_allowed, is_pipe, is_remote, join, local_path

T = TypeVar("T")


def read_file(location: str, name: str, *, allow_pipe: bool = False, retries: int = 4, timeout: float = 60.0) -> bytes:
    """The bytes of the file `name` in a folder or below a URL; raises DataError when it cannot be read."""
    check_allowed(location, allow_pipe)
    if is_remote(location):
        return retried(lambda deadline: fetch(join(location, name), None, deadline), retries, timeout)
    folder = local_path(location)
    if not folder.is_dir():
        raise DataError(f"{redact(location)}: no such folder; set data.shards to the folder that holds {name}")
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no {name}; write it for shards made elsewhere with `alignsae index {folder}`"
        ) from None
    except OSError as error:
        raise DataError(f"{folder / name}: cannot be read ({error.strerror})") from None


def fetch(url: str, span: tuple[int, int] | None, deadline: Deadline) -> bytes:
    """The bytes [start, stop) of a URL, or all of it; of a `pipe:` command always the whole output.

    A server that ignores ranges answers with the whole file: the caller tells by the length. Raises Unreachable.
    """
    if is_pipe(url):
        return _run(url, subprocess.PIPE, deadline)
    start, stop = span or (None, None)
    what = f"bytes {start} to {stop}" if span else "the file"

    def read() -> bytes:
        system, path = _open(url, deadline.seconds)
        return system.cat_file(path, start=start, end=stop, **_limit(system, deadline))

    return _call(read, url, what, deadline)


def version(url: str, deadline: Deadline) -> str:
    """What the server says identifies this version of the file (an ETag, else a date); empty when it says nothing."""
    if is_pipe(url):
        return ""

    def ask() -> dict[str, Any]:
        system, path = _open(url, deadline.seconds)
        try:
            return system.info(path, **_limit(system, deadline))
        except FileNotFoundError as error:
            # fsspec's http takes every failure for a missing file; the cause says whether the server answered 404.
            cause = error.__cause__
            if cause is not None and getattr(cause, "status", None) != 404 and "aiohttp" in type(cause).__module__:
                raise cause from None
            raise

    info = _call(ask, url, "its version", deadline)
    found = (info.get(name) for name in ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime"))
    return str(next((value for value in found if value), ""))


def save(url: str, path: Path, retries: int = 4, timeout: float = 60.0) -> None:
    """Copy a URL or the output of a `pipe:` command to a local file, in pieces.

    A file may take as long as it likes while it grows; the time limit is on standing still. Raises DataError.
    """

    def size() -> int:
        return path.stat().st_size if path.exists() else 0

    def copy(deadline: Deadline) -> None:
        if is_pipe(url):
            with path.open("wb") as file:
                _run(url, file, deadline, size)
            return

        def get() -> None:
            system, remote_path = _open(url, deadline.seconds)
            system.get_file(remote_path, str(path))

        _call(get, url, "the file", deadline, size)

    retried(copy, retries, timeout)


def _open(url: str, timeout: float) -> tuple[Any, str]:
    """(file system, path) that read a URL, without retries of its own; `timeout` limits connecting and each answer."""
    scheme, separator, rest = url.partition("://")
    url = scheme.lower() + separator + rest
    try:
        system, path = fsspec.core.url_to_fs(url, **_options(scheme.lower(), timeout))
        if scheme.lower() == "hf":
            # Its own client retries five times whatever it is told; its files are plain https underneath.
            from huggingface_hub.utils import build_hf_headers

            url, headers = system.url(path), build_hf_headers(token=system.token)
            return fsspec.core.url_to_fs(url, headers=headers, **_options(url.partition(":")[0], timeout))
    except ImportError:
        raise UserError(f"{redact(url)}: its protocol needs a package; run `pip install 'alignsae[remote]'`") from None
    except ValueError:
        raise UserError(
            f"{redact(url)}: unknown protocol; fsspec knows http, https, s3, gs and hf among others"
        ) from None
    if scheme.lower() in ("s3", "s3a"):
        system.retries = 1
    elif scheme.lower() in ("gs", "gcs"):
        private.answer_once(system)
    return system, path


def _options(protocol: str, timeout: float) -> dict[str, Any]:
    """Settings of a backend that carry the time-outs; what the user's fsspec configuration sets beside them stays."""

    def merged(name: str, **own: Any) -> dict[str, Any]:
        return {name: {**fsspec.config.conf.get(protocol, {}).get(name, {}), **own}}

    if protocol in ("s3", "s3a"):
        once = {"total_max_attempts": 1}
        return merged("config_kwargs", connect_timeout=timeout, read_timeout=timeout, retries=once)
    if protocol in ("http", "https", "gs", "gcs"):
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        return {"requests_timeout": limits} if protocol[0] == "g" else merged("client_kwargs", timeout=limits)
    return {}


def _limit(system: Any, deadline: Deadline) -> dict[str, float]:
    """Keyword by which an asynchronous file system cancels a read that takes too long."""
    return {"timeout": max(deadline.left(), 1e-3)} if getattr(system, "async_impl", False) else {}


class _Worker:
    """A thread that reads for one other thread, so that this one can stop waiting. It does not outlive its process."""

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(self.tasks,), name="remote", daemon=True).start()

    def __del__(self) -> None:
        self.tasks.put(None)  # it ends when it is idle; a read that hangs ends by the limits of its backend

    @staticmethod
    def _work(tasks: queue.SimpleQueue) -> None:
        while (task := tasks.get()) is not None:
            future, function = task
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del task, future, function


_own = threading.local()  # fsspec keeps one file system per thread: a worker per thread keeps connections open


def _call(
    function: Callable[[], T], url: str, what: str, deadline: Deadline, progress: Callable[[], object] = lambda: None
) -> T:
    """`function()` while the deadline lasts. Raises Unreachable.

    Backends raise anything from OSError to their own client errors, whose texts hold full URLs: only the type is
    repeated.
    """
    shown = redact(url)
    if not hasattr(_own, "worker"):
        _own.worker = _Worker()
    future: Future[T] = Future()
    _own.worker.tasks.put((future, function))
    try:
        deadline.wait(lambda seconds: bool(wait([future], seconds).done), f"{shown}: {what}", progress)
    except BaseException:
        del _own.worker  # it may hang for long
        raise
    try:
        return future.result()
    except UserError:
        raise
    except FileNotFoundError:
        raise Refused(f"{shown}: no such file") from None
    except PermissionError:
        raise Refused(f"{shown}: access denied; check the credentials of this machine") from None
    except TimeoutError:
        raise Unreachable(f"{shown}: {what} did not arrive within data.timeout={deadline.seconds:g} s") from None
    except Exception as error:
        status = getattr(error, "status", None)
        raise Unreachable(
            f"{shown}: {type(error).__name__}" + (f" {status}" if isinstance(status, int) else "")
        ) from None


def _run(url: str, output: int | IO[bytes], deadline: Deadline, progress: Callable[[], object] = lambda: None) -> bytes:
    """Output of a `pipe:` command, empty when it goes to a file. At the deadline all its processes are killed."""
    process = subprocess.Popen(url.partition(":")[2], shell=True, stdout=output, start_new_session=True)
    printed: bytes = b""

    def done(seconds: float) -> bool:
        nonlocal printed
        try:
            printed = process.communicate(timeout=seconds)[0] or b""
        except subprocess.TimeoutExpired:
            return False
        return True

    try:
        deadline.wait(done, f"{redact(url)}: the output", progress)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    if process.returncode:
        raise Unreachable(f"{redact(url)}: the command failed with exit status {process.returncode}")
    return printed
