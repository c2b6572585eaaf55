"""Where shards live: a local folder or a URL. Everything that prints a location prints `redact(location)`."""

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

# s3://bucket/key, https://host/path?signature; a Windows drive letter or a plain path is none of these.
_SCHEME = re.compile(r"^[a-z][a-z0-9+.\-]+://")


def is_remote(location: str) -> bool:
    """True for a URL (any fsspec protocol but file://) and for a `pipe:` command."""
    return location.startswith("pipe:") or (bool(_SCHEME.match(location)) and not location.startswith("file://"))


def local_path(location: str) -> Path:
    """Path of a local location, with or without file://."""
    return Path(location.removeprefix("file://")).expanduser()


def join(location: str, name: str) -> str:
    """Location of the file `name` in the folder `location`; a query (a signed URL) stays at the end.

    In a `pipe:` command `{name}` stands for the file.
    """
    if location.startswith("pipe:"):
        return location.replace("{name}", name)
    if not is_remote(location):
        return str(local_path(location) / name)
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/" + name))


def redact(location: str) -> str:
    """The location without user, password, query and fragment; of a `pipe:` command only its first word."""
    if location.startswith("pipe:"):
        words = location.removeprefix("pipe:").split()
        return f"pipe:{words[0] if words else ''} ..."
    if not is_remote(location):
        return location
    parts = urlsplit(location)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
