"""Reading small files and byte ranges from wherever a data set lives."""

from trainer.errors import DataError
from trainer.stream.location import is_remote, local_path, redact


def read_file(location: str, name: str, *, allow_pipe: bool = False, retries: int = 4) -> bytes:
    """The bytes of the file `name` in a folder or below a URL; raises DataError when it cannot be read."""
    if is_remote(location):
        raise DataError(f"{redact(location)}: remote shards are not readable here")
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
