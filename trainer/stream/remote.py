"""Fetching bytes from wherever a data set lives: the only home of fsspec. No message ever holds a credential or a signature."""

import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from trainer.errors import DataError, UserError
from trainer.stream.location import is_remote, join, local_path, redact

log = logging.getLogger(__name__)
T = TypeVar("T")
_LONGEST_PAUSE = 5.0  # seconds between attempts


def read_file(location: str, name: str, *, allow_pipe: bool = False, retries: int = 4) -> bytes:
    """The bytes of the file `name` in a folder or below a URL; raises DataError when it cannot be read."""
    if is_remote(location):
        check_allowed(location, allow_pipe)
        return fetch(join(location, name), retries=retries)
    folder = local_path(location)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set data.shards to the folder that holds {name}")
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no {name}; write it for shards made elsewhere with `alignsae index {folder}`"
        ) from None
    except OSError as error:
        raise DataError(f"{folder / name}: cannot be read ({error.strerror})") from None


def check_allowed(location: str, allow_pipe: bool) -> None:
    """Raise UserError for a `pipe:` command that was not permitted."""
    if location.startswith("pipe:") and not allow_pipe:
        raise UserError("pipe: runs a program and is off; set data.allow_pipe=true (or --allow-pipe) to permit it")


def fetch(url: str, span: tuple[int, int] | None = None, retries: int = 4) -> bytes:
    """The bytes [start, stop) of a URL, or all of it; of a `pipe:` command always the whole output.

    A server that ignores ranges answers with the whole file: the caller tells by the length. Raises DataError after `retries`
    further attempts, at once when there is no such file.
    """
    if url.startswith("pipe:"):
        return retried(lambda: _run(url), url, retries)
    system, path = _open(url)
    start, stop = span or (None, None)
    return retried(lambda: system.cat_file(path, start=start, end=stop), url, retries)


def version(url: str, retries: int = 4) -> str:
    """What the server says identifies this version of the file (an ETag, else a date); empty when it says nothing."""
    if url.startswith("pipe:"):
        return ""
    system, path = _open(url)
    info: dict[str, Any] = retried(lambda: system.info(path), url, retries)
    found = (
        info.get(name) for name in ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "mtime")
    )
    return str(next((value for value in found if value), ""))


def retried(attempt: Callable[[], T], url: str, retries: int) -> T:
    """The result of `attempt`, tried 1 + retries times with growing pauses. Raises DataError that names the redacted URL.

    Backends raise anything from OSError to their own client errors, whose texts hold full URLs: only the type is repeated.
    """
    for left in range(retries, -1, -1):
        try:
            return attempt()
        except FileNotFoundError:
            raise DataError(f"{redact(url)}: no such file") from None
        except PermissionError:
            raise DataError(f"{redact(url)}: access denied; check the credentials of this machine") from None
        except Exception as error:
            status = getattr(error, "status", None)
            what = type(error).__name__ + (f" {status}" if isinstance(status, int) else "")
        if left:
            log.info("%s: %s, trying again", redact(url), what)
            time.sleep(min(0.1 * 2 ** (retries - left), _LONGEST_PAUSE))
    raise DataError(f"{redact(url)}: {what}, {retries + 1} attempts failed; check the network or raise data.retries")


def save(url: str, path: Path, retries: int = 4) -> None:
    """Copy a URL or the output of a `pipe:` command to a local file, in pieces."""
    if url.startswith("pipe:"):
        with path.open("wb") as file:
            if subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=file, check=False).returncode:
                raise DataError(f"{redact(url)}: the command failed")
        return
    system, remote_path = _open(url)
    retried(lambda: system.get_file(remote_path, str(path)), url, retries)


def _open(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError:
        raise UserError(f"{redact(url)}: its protocol needs a package; run `pip install 'alignsae[remote]'`") from None
    except ValueError:
        raise UserError(
            f"{redact(url)}: unknown protocol; fsspec knows http, https, s3, gs and hf among others"
        ) from None


def _run(url: str) -> bytes:
    done = subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise OSError("the command failed")
    return done.stdout
