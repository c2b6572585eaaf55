"""Checkpoints that name no rank: one safetensors file per unit (bank, concepts, output bias, value head), so that any strategy and world loads any of them.

    checkpoints/step-00000100/   state.json manifest.json hashes.json dictionary/UNIT.safetensors optimizer/UNIT.safetensors COMPLETE
    checkpoints/latest           name of the newest complete folder

Commit protocol: everything goes to step-N.tmp and is synced to disk; all ranks meet; hashes.json lists what was written; the folder is renamed;
COMPLETE is written; `latest` moves last. Only safetensors and JSON are ever read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.errors import DataError, UserError
from trainer.strategies import Strategy, UnitState
from trainer.stream import Manifest

SCHEMA = 1


@dataclass
class CheckpointConfig:
    """When to save, how many to keep, and where to resume from."""

    every: int = 1000  # steps between saves; 0 = only at the end
    keep: int = 2  # complete checkpoints kept
    resume: str = "auto"  # auto: the newest of this run that verifies | none | a checkpoint or run folder


@dataclass
class RunState:
    """What a run needs beside weights and moments. No random numbers are drawn from ambient state: all come from (seed, step)."""

    step: int
    updates: int
    stage: str
    seed: int
    stream: dict[str, Any]
    rows_digest: int
    dictionary: dict[str, Any]


def describe(dictionary: ConceptDictionary) -> dict[str, Any]:
    """The dictionary's form, as stored in state.json."""
    config = dictionary.config
    return {
        "width": dictionary.width,
        "concepts": dictionary.concept_names,
        "answers": dictionary.answers,
        "free_slots": config.free_slots,
        "bank_slots": config.bank_slots,
        "decoder_norm": config.decoder_norm,
        "value_hidden": config.value_hidden,
    }


def save(root: Path, strategy: Strategy, state: RunState, manifest: Manifest, keep: int) -> Path:
    """Write checkpoint `root`/step-N on all ranks together and return its folder."""
    topology = strategy.topology
    final = root / f"step-{state.step:08d}"
    work = final.with_suffix(".tmp")
    if topology.is_main:
        shutil.rmtree(work, ignore_errors=True)
        (work / "dictionary").mkdir(parents=True)
        (work / "optimizer").mkdir()
    topology.barrier()
    strategy.sync_last_fired()
    strategy.objective.settle()
    kernels = dict(zip(strategy.objective.dictionary.owned, strategy.objective.choice.names, strict=True))
    hashes = {}
    for unit in strategy.unit_names():
        unit_state = strategy.read(unit)
        if unit_state is None:
            continue
        metadata = {"kernel": kernels[int(unit.removeprefix("bank-"))]} if unit.startswith("bank-") else {}
        moments = {f"exp_avg.{k}": v for k, v in unit_state.exp_avg.items()}
        moments |= {f"exp_avg_sq.{k}": v for k, v in unit_state.exp_avg_sq.items()}
        for name, tensors in (
            (f"dictionary/{unit}.safetensors", unit_state.weights),
            (f"optimizer/{unit}.safetensors", moments),
        ):
            save_file({k: v.contiguous() for k, v in tensors.items()}, work / name, metadata=metadata)
            hashes[name] = _fingerprint(work / name)
    _write_json(work / f"hashes-{topology.rank}.json", hashes)
    topology.barrier()
    if topology.is_main:
        _write_json(work / "state.json", {"schema": SCHEMA, **vars(state)})
        manifest.save(work)
        _commit(work, final)
        _retain(root, keep)
    topology.barrier()
    return final


def _commit(work: Path, final: Path) -> None:
    hashes = {name: _fingerprint(work / name) for name in ("state.json", "manifest.json")}
    for part in sorted(work.glob("hashes-*.json")):
        hashes |= json.loads(part.read_text())
        part.unlink()
    _write_json(work / "hashes.json", hashes)
    for folder in (work / "dictionary", work / "optimizer", work):
        _sync(folder)
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)
    (final / "COMPLETE").write_text("")
    _sync(final)
    _sync(final.parent)
    pointer = final.parent / "latest.tmp"
    pointer.write_text(final.name + "\n")
    pointer.replace(final.parent / "latest")


def _retain(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints; never the last one."""
    for folder in sorted(root.glob("step-*[0-9]"))[: -max(keep, 1)]:
        shutil.rmtree(folder)


def verify(folder: Path) -> str | None:
    """Why a checkpoint folder must not be used, or None if every file is there and has its hash."""
    if not (folder / "COMPLETE").exists():
        return "it was not completed"
    try:
        hashes = json.loads((folder / "hashes.json").read_text())
        for name, expected in hashes.items():
            if _fingerprint(folder / name) != expected:
                return f"{name} differs from its hash"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None


def find(resume: str, root: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, or None for a fresh start, and which were skipped and why.

    Raises UserError when `resume` names a folder without a usable checkpoint.
    """
    if resume == "none":
        return None, []
    named = resume != "auto"
    candidates = list(_candidates(Path(resume) if named else root))
    skipped: list[str] = []
    for folder in candidates:
        reason = verify(folder)
        if reason is None:
            return folder, skipped
        skipped.append(f"{folder}: {reason}")
    if named:
        raise UserError(
            f"checkpoint.resume={resume}: no usable checkpoint there ({'; '.join(skipped) or 'none found'})"
        )
    return None, skipped


def _candidates(path: Path) -> Iterator[Path]:
    if path.name == "latest" and path.is_file():
        path = path.parent / path.read_text().strip()
    if (path / "state.json").exists():
        yield path
        return
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    yield from sorted((p for p in root.glob("step-*[0-9]") if p.is_dir()), reverse=True)


def read_state(folder: Path) -> RunState:
    """state.json of a checkpoint folder. Raises DataError on another schema."""
    values = json.loads((folder / "state.json").read_text())
    if values.pop("schema", None) != SCHEMA:
        raise DataError(f"{folder}/state.json has another schema than {SCHEMA}; use the version that wrote it")
    return RunState(**values)


def load_weights(folder: Path, dictionary: ConceptDictionary) -> list[str]:
    """Fill the units that `dictionary` holds; returns the kernel names of its free banks."""
    kernels = []
    for unit, module in dictionary.units().items():
        path = folder / "dictionary" / f"{unit}.safetensors"
        module.load_state_dict(_read(path))
        if unit.startswith("bank-"):
            with safe_open(path, framework="pt") as file:
                kernels.append((file.metadata() or {}).get("kernel", "dense"))
    return kernels


def load_moments(folder: Path, strategy: Strategy) -> None:
    """Set the optimizer state of every unit; after the engine was built."""
    for unit in strategy.unit_names():
        if strategy.holds(unit):
            moments = _read(folder / "optimizer" / f"{unit}.safetensors")
            strategy.write(unit, UnitState({}, _strip(moments, "exp_avg."), _strip(moments, "exp_avg_sq.")))


def load_dictionary(path: str | Path) -> tuple[ConceptDictionary, Manifest]:
    """The whole dictionary and the manifest of its training data, from a run folder, a checkpoint folder or `checkpoints/latest`.

    Raises UserError when there is no usable checkpoint.
    """
    folder, _ = find(str(path), Path(path))
    assert folder is not None  # a named path that has none raises
    form = read_state(folder).dictionary
    manifest = Manifest.load(str(folder))
    sizes = {key: form[key] for key in ("free_slots", "bank_slots", "decoder_norm", "value_hidden")}
    dictionary = ConceptDictionary(form["width"], form["concepts"], DictionaryConfig(**sizes), answers=form["answers"])
    load_weights(folder, dictionary)
    dictionary.set_normalisation(manifest.mean, manifest.scale)
    return dictionary.eval().requires_grad_(False), manifest


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise DataError(f"{path} cannot be read ({error}); resume from another checkpoint") from error


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, which is synced to disk first."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
