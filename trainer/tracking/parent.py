"""The run of the store that the points of a sweep are parts of."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.tracking.config import OFF, TrackingConfig, reason, store_uri
from trainer.tracking.description import describe
from trainer.tracking.store import StoredRun

log = logging.getLogger(__name__)


def open_parent(folder: Path, config: TrackingConfig, params: Mapping[str, Any]) -> StoredRun | None:
    """The run of a folder whose subfolders are runs, in the store that they use; it goes on where it exists.

    params: what the runs have in common. None where tracking is off, or where the store is away, which is logged: the
    runs are then tracked without a parent.
    """
    if config.uri == OFF:
        return None
    uri = store_uri(config.uri, folder / "run")
    try:
        return StoredRun(folder, uri, describe(folder, config, params, {}, []), training=True)
    except Exception as error:  # whatever a store may raise
        log.warning("no parent run at %s: %s", config.redacted().uri or "the default store", reason(error, uri))
        return None
