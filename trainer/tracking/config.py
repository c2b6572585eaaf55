"""Which MLflow store, and what of its address may be shown."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from trainer.stream.location import redact

OFF = "off"


@dataclass
class TrackingConfig:
    """MLflow store and names."""

    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else a SQLite file beside the run folder; "off": JSONL only
    experiment: str | None = None  # None: MLFLOW_EXPERIMENT_NAME, else alignsae
    run_name: str | None = None  # None: MLFLOW_RUN_NAME, else the name of the run folder
    parent: str | None = None  # id of the MLflow run that this run is a part of, such as a sweep


def store_uri(uri: str | None, run_dir: Path) -> str:
    """The configured store, MLFLOW_TRACKING_URI, or the SQLite file beside the run folder.

    MLFLOW_TRACKING_URI also stands in for a configured store that is the same but for credentials: those are never stored.
    """
    outside = os.environ.get("MLFLOW_TRACKING_URI")
    if outside and (not uri or uri == shown(outside)):
        return outside
    return uri or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


def shown(uri: str) -> str:
    """The URI as it may be stored, logged and shown: without credentials and query."""
    scheme, colon, rest = uri.partition(":")
    if scheme.lower().startswith("sqlite"):  # a path and no host
        return uri
    try:
        return redact(scheme.lower() + colon + rest)
    except ValueError:  # no URI at all, such as http://[
        return f"{scheme}:..."


def split(uri: str) -> SplitResult:
    """Parts of a URI; empty ones where it is none."""
    try:
        return urlsplit(uri)
    except ValueError:
        return SplitResult("", "", "", "", "")


def reason(error: BaseException, uri: str) -> str:
    """Type and text of an error of the store at `uri`, in one line of at most 250 characters, without credentials."""
    text = " ".join(str(error).split())
    parts = split(uri)
    credentials = parts.netloc.rpartition("@")[0]
    secrets = (
        (uri, shown(uri)),
        (f"{credentials}@", ""),
        (parts.password, "***"),
        (unquote(parts.password or ""), "***"),
    )
    for secret, instead in secrets if credentials else ():
        text = text.replace(secret, instead) if secret else text
    return f"{type(error).__name__}: {text}"[:250]
