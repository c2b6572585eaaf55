"""Which MLflow store, and what of its address may be shown."""

import os
import re
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from trainer.errors import UserError
from trainer.redact import redact

OFF = "off"
# Stores that MLflow has; packages may bring others.
SCHEMES = ("file", "sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks", "databricks-uc", "uc")


@dataclass
class TrackingConfig:
    """MLflow store and names."""

    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else a SQLite file beside the run folder; "off": JSONL only
    experiment: str | None = None  # None: MLFLOW_EXPERIMENT_NAME, else alignsae
    run_name: str | None = None  # None: MLFLOW_RUN_NAME, else the name of the run folder
    parent: str | None = None  # id of the MLflow run that this run is a part of, such as a sweep

    def validate(self) -> None:
        """Raise UserError for a name that cannot be."""
        for name in ("experiment", "run_name", "parent"):
            if getattr(self, name) == "":
                raise UserError(f"tracking.{name} is empty; give it a name or leave it out")
        scheme, separator, _ = (self.uri or "").partition("://")
        if separator and scheme.lower().partition("+")[0] not in SCHEMES:
            brought = [entry.name for entry in entry_points(group="mlflow.tracking_store")]
            if scheme not in brought:
                raise UserError(
                    f"tracking.uri begins with {scheme!r:.40}, which MLflow has no store for; "
                    f"use one of {', '.join((*SCHEMES, *brought))}, or off"
                )

    def redacted(self) -> "TrackingConfig":
        """As it may be stored and shown."""
        return replace(self, uri=self.uri and shown(self.uri))


def store_uri(uri: str | None, run_dir: Path) -> str:
    """The configured store, MLFLOW_TRACKING_URI, or the SQLite file beside the run folder.

    MLFLOW_TRACKING_URI also stands in for a store that is the same but for credentials, which are never kept.
    """
    outside = os.environ.get("MLFLOW_TRACKING_URI")
    if outside and (not uri or uri == shown(outside)):
        return outside
    return uri or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


def shown(uri: str) -> str:
    """The URI or location as it may be stored, logged and shown: without credentials and query."""
    if uri.lower().startswith("sqlite"):  # a path and no host
        return uri
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.\-]*(?=://)", uri)
    try:
        return redact(uri if scheme is None else scheme.group().lower() + uri[scheme.end() :])
    except ValueError:  # no URI at all, such as http://[
        return f"{uri.partition(':')[0]}:..."


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
