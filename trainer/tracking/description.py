"""What MLflow is told about a run besides its points, kept as RUN/tracking.json to enter or complete the run later."""

import getpass
import logging
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from os import environ
from pathlib import Path
from typing import Any

from trainer.files import read_json, write_json
from trainer.redact import redact
from trainer.run_folder import RunFolder
from trainer.tracking.config import TrackingConfig, shown

log = logging.getLogger(__name__)

RUN_KEY = "run_key"  # tag that finds a run whose id was lost with the server's answer
PACKAGES = ("alignsae", "torch", "accelerate", "deepspeed", "transformers", "mlflow")
MAX_PARAM = 6000  # characters that MLflow takes


@dataclass(frozen=True)
class DatasetInput:
    """Shards that a run reads. source: folder or URL; digest: of the manifest; context: what they are for."""

    name: str
    source: str
    digest: str
    rows: int
    context: str = "training"


@dataclass(frozen=True)
class Description:
    """A run as MLflow is to show it. Holds no credentials.

    key: made once per run, stored as a tag. uri: as configured, without credentials; None is the default store.
    start_time: ms since 1970.
    """

    run_name: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    uri: str | None = None
    experiment: str = "alignsae"
    start_time: int = field(default_factory=lambda: int(time.time() * 1000))
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    inputs: tuple[DatasetInput, ...] = ()

    def save(self, run_dir: Path) -> None:
        """Write RUN/tracking.json; a disk that refuses is named and nothing more, the run can be tracked without."""
        path = RunFolder(run_dir).tracking
        try:
            write_json(path, asdict(self))
        except OSError as error:
            log.warning("%s cannot be written (%s)", path, error.strerror)

    @classmethod
    def load(cls, run_dir: Path) -> "Description | None":
        """The description in RUN/tracking.json, None where there is none. Raises DataError for a damaged one."""
        path = RunFolder(run_dir).tracking
        return read_json(path, cls, "remove it to have the run entered anew") if path.exists() else None


def kept_uri(run_dir: Path) -> str | None:
    """The store that a run was tracked in, as its configuration named it; None is the default one."""
    description = Description.load(run_dir)
    return None if description is None else description.uri


def describe(
    run_dir: Path,
    config: TrackingConfig,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    inputs: Sequence[DatasetInput],
) -> Description:
    """The description of a run that starts, without the credentials of `tracking.uri` and of the inputs' sources."""
    uri = config.redacted().uri
    texts = {key: redact(str(value))[:MAX_PARAM] for key, value in params.items()}
    if "tracking.uri" in texts:
        texts["tracking.uri"] = str(uri)
    return Description(
        run_name=config.run_name or environ.get("MLFLOW_RUN_NAME") or RunFolder(run_dir).name,
        uri=uri,
        experiment=config.experiment or environ.get("MLFLOW_EXPERIMENT_NAME") or "alignsae",
        params=texts,
        tags={**_standard_tags(config.parent), **{key: str(value) for key, value in tags.items()}},
        inputs=tuple(replace(item, source=shown(item.source)) for item in inputs),
    )


def _standard_tags(parent: str | None) -> dict[str, str]:
    """Source, user, versions and parent, under the names that MLflow's pages know where there are such."""
    revision = git_revision()
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container may run under a number that has no name
        user = "unknown"
    tags = {
        "mlflow.user": environ.get("MLFLOW_TRACKING_USERNAME") or user,
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": revision.removesuffix("-dirty"),
        "git_revision": revision,
        "version.python": platform.python_version(),
    }
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed
            continue
    return tags


def git_revision() -> str:
    """Revision of the source tree that runs, with `-dirty` for local changes; `unknown` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
