"""Which format a folder, file or address is of; files of an address are fetched first."""

from pathlib import Path

from trainer.errors import UserError
from trainer.pretrained import folder as imported
from trainer.pretrained.formats import FOLDERS, GEMMA, WRITTEN, gemma_scope
from trainer.pretrained.own import CheckpointSource
from trainer.pretrained.source import Source
from trainer.redact import redact
from trainer.run_folder import RunFolder
from trainer.stream.attempts import Refused
from trainer.stream.location import check_allowed, is_remote, join, local_path
from trainer.stream.remote import save

_PICKLES = (".pt", ".pth", ".pkl", ".bin", ".ckpt")
_BESIDE = ("concepts.json", WRITTEN, "activation_scaler.json")  # read where they are there


def open_source(location: str, scratch: Path) -> Source:
    """The dictionary at a local folder or file, or below a URL (any protocol of fsspec, `hf://` among them).

    scratch: an existing folder for what is fetched and unpacked; it must stay while the Source is used. Raises
    UserError for what is of no known format or of one that cannot be imported, DataError for damaged files.
    """
    if is_remote(location):
        check_allowed(location, allow_pipe=False)
        return _open(_fetch(location, scratch), location, scratch)
    return _open(local_path(location), location, scratch)


def _open(path: Path, location: str, scratch: Path) -> Source:
    shown = redact(location)
    if path.suffix in _PICKLES:
        raise UserError(f"{shown}: a pickle can run code and is never read; save it as safetensors where it comes from")
    if path.suffix == ".npz" and path.is_file():
        return gemma_scope(path, shown, scratch)
    if not path.is_dir():
        raise UserError(f"{shown}: no such folder; name the one that holds cfg.json, {GEMMA} or checkpoints")
    if (path / imported.FILE_NAME).is_file():
        raise UserError(f"{shown} was imported already; name it in dictionary.start_from")
    for name, read in FOLDERS.items():
        if (path / name).is_file():
            return read(path, shown)
    if (path / GEMMA).is_file():
        return gemma_scope(path / GEMMA, shown, scratch)
    if (path / "state.json").is_file() or RunFolder(path).checkpoints.is_dir() or any(path.glob("step-*")):
        return CheckpointSource(path, shown)
    raise UserError(f"{shown}: holds no dictionary of a known format{_hint(path)}")


def _hint(path: Path) -> str:
    names = (*FOLDERS, GEMMA)
    below = sorted(p.name for p in path.iterdir() if p.is_dir() and any((p / name).is_file() for name in names))
    if below:
        return f"; its folders do: {', '.join(below[:8])}{' ...' if len(below) > 8 else ''}"
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
    if pickles:
        return f"; {pickles[0]} is a pickle, which can run code and is never read: save it as safetensors"
    return f" ({', '.join(names)}, or a run of this trainer)"


def _fetch(location: str, scratch: Path) -> Path:
    """A local copy of the files of one dictionary."""
    folder = scratch / "source"
    folder.mkdir()
    if location.partition("?")[0].endswith(".npz"):
        save(location, folder / GEMMA)
        return folder / GEMMA

    def fetched(name: str) -> bool:
        return _try(join(location, name), folder / name)

    weights = next((name for name in (*FOLDERS, GEMMA) if fetched(name)), None)
    if weights is None:
        raise UserError(
            f"{redact(location)}: holds none of {', '.join((*FOLDERS, GEMMA))}; name the folder of one dictionary"
        )
    for name in ("cfg.json", *_BESIDE):
        fetched(name)
    return folder


def _try(url: str, path: Path) -> bool:
    """Whether there is such a file; it is then here."""
    try:
        save(url, path)
    except Refused:
        path.unlink(missing_ok=True)
        return False
    return True
