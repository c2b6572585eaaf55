"""Where shards live: a local folder, a URL, or a `pipe:` command. What prints one prints `redact(location)`."""

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from trainer.errors import UserError

# s3://bucket/key, https://host/path?signature, simplecache::http://...; a drive letter or a plain path is none of
# these.
_SCHEME = re.compile(r"[a-z][a-z0-9+.\-]+(://|::)", re.IGNORECASE)
_FILE = "file://"


def is_pipe(location: str) -> bool:
    """True for a `pipe:` command."""
    return location[:5].lower() == "pipe:"


def is_remote(location: str) -> bool:
    """True for a URL (any fsspec protocol but file://) and for a `pipe:` command."""
    return is_pipe(location) or (bool(_SCHEME.match(location)) and location[: len(_FILE)].lower() != _FILE)


def check_allowed(location: str, allow_pipe: bool) -> None:
    """Raise UserError for a `pipe:` command that was not permitted, and for a chain of protocols."""
    if is_pipe(location) and not allow_pipe:
        raise UserError(
            "a pipe: command runs a program and is off; set data.allow_pipe=true (or --allow-pipe) to permit it"
        )
    chained = _SCHEME.match(location)
    if chained and chained[1] == "::":
        raise UserError(
            f"{chained[0]}: chained protocols are not read; give the URL behind the last ::, "
            "remote blocks are cached in data.cache_dir"
        )


def local_path(location: str) -> Path:
    """Path of a local location, with or without file://."""
    plain = location[len(_FILE) :] if location[: len(_FILE)].lower() == _FILE else location
    return Path(plain).expanduser()


def join(location: str, name: str) -> str:
    """Location of the file `name` in the folder `location`; a query (a signed URL) stays at the end.

    In a `pipe:` command `{name}` stands for the file.
    """
    if is_pipe(location):
        return location.replace("{name}", name)
    if not is_remote(location):
        return str(local_path(location) / name)
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/" + name))
