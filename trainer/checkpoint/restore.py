"""Finding a checkpoint that can be trusted, and loading it."""

import logging
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.checkpoint.files import digest
from trainer.checkpoint.state import RunState, least_bytes, read_state
from trainer.dictionary import ConceptDictionary, DictionaryForm
from trainer.errors import DataError, UserError
from trainer.files import Count, checked, read_json
from trainer.optimizer import MOMENTS
from trainer.run_folder import RunFolder
from trainer.strategies import Strategy, UnitState
from trainer.stream import Manifest
from trainer.topology import Topology

log = logging.getLogger(__name__)

_NAME = re.compile(r"(?:(?:dictionary|optimizer)/[a-z0-9-]+\.safetensors|state\.json|manifest\.json)\Z")
POINTERS = ("latest", "best")  # files beside checkpoints that hold the name of one
LOOKS = 10  # at checkpoints that a run under way replaces while they are read
_STEP = re.compile(r"step-(\d{8,})\Z")


@dataclass(frozen=True)
class ListedFile:
    """What hashes.json says of a file: its size, and its hash as `files.digest` gives it."""

    bytes: Count
    xxh3_128: str


ADDED = {"dependence", "W_write"}  # buffers that checkpoints of earlier versions lack; they start anew


def verify(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Why a checkpoint folder must not be used, or None if every file is there and has its hash.

    Ranks share the hashing: each calls this with its number `part` of `parts` and looks at that share of the files.
    """
    if not (folder / "COMPLETE").exists():
        return "it was not completed"
    try:
        entries = read_json(folder / "hashes.json", dict[str, Any], "it is damaged")
        listed = {name: _listed(name, entry) for name, entry in entries.items()}
        for name, least in least_bytes(read_state(folder), len(listed)).items():
            if name not in listed:
                return f"{name} is not in hashes.json"
            if listed[name].bytes < least:
                return f"{name} has {listed[name].bytes} bytes, too few for the dictionary that state.json describes"
        for name in sorted(listed)[part::parts]:
            if (folder / name).stat().st_size != listed[name].bytes:
                return f"{name} has another size than hashes.json says"
            if digest(folder / name) != listed[name].xxh3_128:
                return f"{name} differs from its hash"
    except (OSError, DataError) as error:
        return f"it cannot be read ({error})"
    return None


def _listed(name: str, entry: object) -> ListedFile:
    if not _NAME.match(name):
        raise DataError(f"hashes.json lists {name!r:.80}, which is no file of a checkpoint")
    try:
        return checked(entry, ListedFile)
    except ValueError as error:
        raise DataError(f"hashes.json has no size and hash of {name} ({error})") from None


def find(resume: str, root: Path, topology: Topology | None = None) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, or None for a fresh start, and which were skipped and why. Called on all ranks.

    Args:
        resume: see CheckpointConfig.
        root: checkpoints folder of this run.
        topology: ranks that look together; None: this process alone.

    Raises UserError when `resume` names a folder without a usable checkpoint, when all checkpoints of this run are
    damaged (a start from step 0 would wipe its figures), or when the ranks do not see the same folder.
    """
    topology = topology or Topology()
    if resume == "none":
        return None, []
    named = resume != "auto"
    candidates = list(_candidates(Path(resume) if named else root))
    _refuse_other_views(candidates, root, topology)
    skipped: list[str] = []
    for folder in candidates:
        reason = verify(folder, topology.rank, topology.world)
        if not topology.any_over_world(reason is not None):
            return folder, skipped
        skipped.append(f"{folder}: {reason or 'another rank found it damaged'}")
    if named:
        raise UserError(
            f"checkpoint.resume={resume}: no usable checkpoint there ({'; '.join(skipped) or 'none found'})"
        )
    damaged = [reason for folder, reason in zip(candidates, skipped, strict=True) if (folder / "COMPLETE").exists()]
    if topology.any_over_world(bool(damaged)):  # unfinished ones are what a kill during the first save leaves
        raise UserError(
            f"no checkpoint of {root} can be used ({'; '.join(damaged or skipped)}); put a whole copy back, "
            f"or start anew with another run.dir"
        )
    return None, skipped


def folder_name(step: int) -> str:
    """Name of the folder of the checkpoint after this many steps."""
    return f"step-{step:08d}"


def is_complete(root: Path, step: int) -> bool:
    """Whether `root` holds a checkpoint after this many steps, damaged or not."""
    return (root / folder_name(step) / "COMPLETE").exists()


def step_of(folder: Path) -> int:
    """Step in the name of a checkpoint folder; -1 for another name."""
    match = _STEP.match(folder.name)
    return int(match.group(1)) if match else -1


def saved(root: Path) -> list[Path]:
    """Folders step-N, newest first, whatever is in them."""
    return sorted((p for p in root.glob("step-*") if step_of(p) >= 0 and p.is_dir()), key=step_of, reverse=True)


def _candidates(path: Path) -> Iterator[Path]:
    try:
        is_pointer = path.name in POINTERS and path.is_file()
    except OSError as error:
        raise UserError(f"checkpoint.resume={str(path)[:100]}: {error.strerror}") from error
    if is_pointer:
        path = path.parent / path.read_text(errors="replace").strip()[:100]
    if (path / "state.json").exists():
        yield path
        return
    inside = RunFolder(path).checkpoints
    yield from saved(inside if inside.is_dir() else path)


def kept_form(resume: str, root: Path) -> DictionaryForm | None:
    """The form of the dictionary in the newest checkpoint that a run with this setting looks at; None without one.

    Only what can be read is asked for; whether the checkpoint is whole is for `find` to say.
    """
    if resume == "none":
        return None
    for folder in _candidates(root if resume == "auto" else Path(resume)):
        try:
            return read_state(folder).dictionary
        except DataError:
            continue
    return None


def refuse_later(root: Path, step: int) -> None:
    """Raise UserError when `root` holds complete checkpoints beyond `step`, where a run starts that saves there too."""
    later = [p for p in saved(root) if step_of(p) > step and (p / "COMPLETE").exists()]
    if later:
        raise UserError(
            f"{root} holds checkpoints up to step {step_of(later[0])}, but this run starts at step {max(step, 0)} "
            f"and would mix with them; choose another run.dir, delete them, or use checkpoint.resume=auto"
        )


def _refuse_other_views(candidates: list[Path], root: Path, topology: Topology) -> None:
    view = zlib.crc32("\n".join(folder.name for folder in candidates).encode())
    total = topology.sum_over_world(torch.tensor(view, dtype=torch.int64, device=topology.device))
    if topology.any_over_world(int(total) != topology.world * view):
        raise UserError(
            f"ranks see different checkpoints in {root}; run.dir must be on a file system that all nodes share"
        )


def load_unit(folder: Path, name: str, unit: nn.Module) -> str | None:
    """Fill a unit (ConceptDictionary.units) in place, before an engine has it; returns the kernel of its bank."""
    path = folder / "dictionary" / f"{name}.safetensors"
    own = unit.state_dict()
    read, metadata = _read(path)
    tensors = {key: own[key] for key in ADDED & own.keys()} | read
    _refuse_other_shapes(path, tensors, {key: tuple(t.shape) for key, t in own.items()})
    unit.load_state_dict(tensors)
    return metadata.get("kernel")


def load_moments(folder: Path, strategy: Strategy) -> None:
    """Set the optimizer state of every unit; after the engine was built."""
    form = strategy.objective.dictionary.form
    for unit in form.units():
        if strategy.holds(unit):
            path = folder / "optimizer" / f"{unit}.safetensors"
            moments, _ = _read(path)
            shapes = form.shapes(unit) if strategy.trains(unit) else {}
            _refuse_other_shapes(path, moments, {f"{k}.{n}": s for k in MOMENTS for n, s in shapes.items()})
            strategy.write(unit, UnitState({}, _strip(moments, "exp_avg."), _strip(moments, "exp_avg_sq.")))


def load_dictionary(path: str | Path) -> tuple[ConceptDictionary, Manifest]:
    """The whole dictionary and the manifest of its training data.

    path: a run folder (its newest checkpoint is read), a checkpoint folder, `checkpoints/latest` or `checkpoints/best`.
    Where a run under way replaces its checkpoints meanwhile, the next one is taken.
    Raises UserError when there is no usable checkpoint.
    """
    for _ in range(LOOKS):
        listed = _listing(Path(path))
        try:
            return _load(Path(path))
        except (UserError, OSError):
            if _listing(Path(path)) == listed:
                raise
    raise UserError(f"{path}: checkpoints are replaced faster than they can be read; copy one, or wait for the end")


def _listing(path: Path) -> list[tuple[Path, int]]:
    """Checkpoint folders at a path, and which folders they are: a run under way replaces them."""
    found = [p for p in _candidates(path) if p.is_dir()]
    with suppress(OSError):
        return [(p, p.stat().st_ino) for p in found]
    return []


def _load(path: Path) -> tuple[ConceptDictionary, Manifest]:
    folder, _ = find(str(path), path)
    assert folder is not None  # a named path that has none raises
    state = read_state(folder)
    manifest = Manifest.load(str(folder))
    dictionary = build(folder, state, manifest)
    return dictionary.eval().requires_grad_(False), manifest


def build(folder: Path, state: RunState, manifest: Manifest) -> ConceptDictionary:
    """The dictionary of a checkpoint folder, with the normalisation of the manifest."""
    form = state.dictionary
    if manifest.width != form.width:
        raise DataError(f"manifest.json of the checkpoint has width {manifest.width}, state.json {form.width}")
    dictionary = ConceptDictionary(form, on_unit=partial(load_unit, folder))
    dictionary.set_normalisation(manifest.mean, manifest.scale)
    if state.writes_apart:
        dictionary.written = dictionary.concepts.W_write
    elif state.freeze == "free" and state.awake:
        log.warning(
            "%s: what its concept slots write is not known; the end of a run and its best evaluations measure it",
            folder,
        )
    return dictionary


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises DataError, also where it vanishes meanwhile."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, RuntimeError, SafetensorError) as error:  # torch maps the file, and has errors of its own
        raise DataError(f"{path} cannot be read ({error}); resume from another checkpoint") from error


def _refuse_other_shapes(path: Path, tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise DataError(
                f"{path}: {name} has shape {found.get(name)}, not {wanted.get(name)}; resume from another checkpoint"
            )


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
