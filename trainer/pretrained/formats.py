"""Readers of other trainers' folders: SAELens, sparsify, Gemma Scope, and this trainer's exports.

Each takes a local folder and returns a Source, or refuses by name what could only be read wrongly.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.errors import DataError, UserError
from trainer.files import read_json
from trainer.pretrained.source import Facts, Layout, Source, StoredSource, finite, sha256_of
from trainer.pretrained.tensors import NpzStore, SafetensorsStore

SAELENS, SPARSIFY, GEMMA, OWN = "sae_weights.safetensors", "sae.safetensors", "params.npz", "dictionary.safetensors"
WRITTEN = "concepts.safetensors"  # of this trainer's exports: W_write [m, D], see Source.written
# Architectures of SAELens whose code is decided slot by slot, or row by row by the k largest.
_SAELENS = {
    "standard": (),
    "jumprelu": ("threshold", "log_threshold"),
    "topk": (),
    "batchtopk": ("topk_threshold",),  # of a training checkpoint; at inference SAELens stores it as jumprelu
}


def saelens(folder: Path, location: str) -> Source:
    """A SAELens folder (cfg.json, sae_weights.safetensors) of version 6, or of an earlier one where the fields mean
    the same."""
    path = folder / "cfg.json"
    config = _json(path)
    metadata = _dict(config.get("metadata")) or config  # before version 6 the fields lay side by side
    details = _dict(metadata.get("training_architecture_details"))
    architecture = str(config.get("architecture", "standard"))
    activation = str(config.get("activation_fn", config.get("activation_fn_str", "relu")))
    kwargs = _dict(config.get("activation_fn_kwargs"))
    if architecture == "standard" and activation == "topk":  # spelled so before version 6
        architecture, config = "topk", {**config, "k": kwargs.get("k")}
    elif activation != "relu" and architecture not in ("topk", "batchtopk"):
        raise UserError(f"{path}: activation function {activation!r} is not known here; relu and topk are")
    if architecture not in _SAELENS:
        raise UserError(f"{path}: architecture {architecture!r} cannot be imported; {', '.join(_SAELENS)} can")
    if config.get("hook_name_out") or metadata.get("hook_name_out"):
        raise UserError(f"{path}: it predicts another hook point than it reads, which no dictionary here does")
    store = SafetensorsStore(folder / SAELENS)
    threshold = next((name for name in _SAELENS[architecture] if name in store.names()), "")
    if _SAELENS[architecture] and not threshold:
        raise store.missing(_SAELENS[architecture][0])
    if "scaling_factor" in store.names() and not bool((store.whole("scaling_factor") == 1).all()):
        raise UserError(f"{folder / SAELENS}: holds a finetuning scaling factor, which is not known here")
    layout = Layout(
        b_enc="b_enc" if "b_enc" in store.names() else "",
        threshold=threshold,
        encoder_columns=True,
        subtracts_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        factor=_factor(config, folder),
        by_norm=architecture in ("topk", "batchtopk") and bool(config.get("rescale_acts_by_decoder_norm", False)),
        log_threshold=threshold == "log_threshold",
    )
    facts = Facts("saelens", architecture, location, *_hook(metadata), files=sha256_of(folder, SAELENS, "cfg.json"))
    facts.concepts, facts.gains = _concepts(folder), _gains(folder)
    facts.training = {k: v for k, v in metadata.items() if k not in ("model_name", "hook_name") and v is not None}
    found = StoredSource(facts, store, layout)
    if (config.get("d_in"), config.get("d_sae")) != (found.width, found.slots):
        raise DataError(
            f"{path}: d_in {config.get('d_in')} and d_sae {config.get('d_sae')}, "
            f"but the weights are {found.width} wide and have {found.slots} slots"
        )
    if architecture == "topk":
        found.top_k = _k(config.get("k"), found.slots, path)
    else:
        found.k = _positive(config.get("k", details.get("k")))
    found.written = _written(folder, found)
    return found


def sparsify(folder: Path, location: str) -> Source:
    """A folder of EleutherAI's sparsify (cfg.json, sae.safetensors): TopK on relu(W_enc (h - b_dec) + b_enc)."""
    path = folder / "cfg.json"
    config = _json(path)
    for name, what in (("transcode", "is a transcoder"), ("skip_connection", "has a linear skip connection")):
        if config.get(name):
            raise UserError(f"{path}: it {what}, which no dictionary here does")
    if config.get("signed") or config.get("activation", "topk") != "topk":
        named = "signed TopK" if config.get("signed") else config.get("activation")
        raise UserError(f"{path}: activation {named!r} cannot be imported; topk can")
    store = SafetensorsStore(folder / SPARSIFY)
    if "W_skip" in store.names():
        raise UserError(f"{folder / SPARSIFY}: it has a linear skip connection, which no dictionary here does")
    layout = Layout(W_enc="encoder.weight", b_enc="encoder.bias", subtracts_b_dec=True)
    # Of the run: beside the hook point's folder.
    above = folder.parent / "config.json"
    run = _json(above) if above.is_file() else {}
    hook = hook_point_of(str(config.get("hookpoint") or Path(location).name))
    facts = Facts("sparsify", "topk", location, str(run.get("model") or ""), hook)
    facts.files, facts.training = sha256_of(folder, SPARSIFY, "cfg.json"), {**run, **config}
    found = StoredSource(facts, store, layout)
    if config.get("d_in") != found.width:
        raise DataError(f"{path}: d_in {config.get('d_in')}, but the weights are {found.width} wide")
    found.top_k = _k(config.get("k"), found.slots, path)
    return found


def gemma_scope(path: Path, location: str, scratch: Path) -> Source:
    """A `params.npz` of Gemma Scope: JumpReLU on raw activations, no bias taken off the input. Model and hook point
    from its address."""
    store = NpzStore(path, scratch)
    layout = Layout(threshold="threshold", encoder_columns=True)
    facts = Facts("gemma-scope", "jumprelu", location, *_gemma_names(location))
    facts.files = sha256_of(path.parent, path.name)
    return StoredSource(facts, store, layout)


def own_export(folder: Path, location: str) -> Source:
    """What `alignsae export --format safetensors` writes."""
    named = _json(folder / "concepts.json")
    store = SafetensorsStore(folder / OWN)
    layout = Layout(threshold="threshold" if "threshold" in store.names() else "")
    architecture = "jumprelu" if layout.threshold else "standard"
    facts = Facts("alignsae", architecture, location, str(named.get("model", "")), str(named.get("hook_point", "")))
    facts.files, facts.concepts = sha256_of(folder, OWN, "concepts.json"), _concepts(folder)
    facts.training, facts.gains = _dict(named.get("training")), _gains(folder)
    found = StoredSource(facts, store, layout)
    found.written = _written(folder, found)
    return found


def hook_point_of(name: str) -> str:
    """The name that `alignsae extract` gives to a hook point; other spellings of the output of a block are
    translated."""
    match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)$", name)
    if match:
        return f"blocks.{match[1]}.hook_resid_post"
    return name if name.startswith("blocks.") or re.search(r"[a-z]\.\d", name) else ""


def _factor(config: dict[str, Any], folder: Path) -> float:
    """What activations are multiplied with before the dictionary sees them; refuses what no constant can stand for."""
    kind = config.get("normalize_activations")
    if kind in (None, False, "none"):
        return 1.0
    if kind in (True, "expected_average_only_in"):
        scaler = folder / "activation_scaler.json"
        if not scaler.is_file():
            raise UserError(
                f"{folder}: normalize_activations={kind!r}, but no activation_scaler.json holds the factor; "
                f"fold it in with SAELens (fold_activation_norm_scaling_factor) and save again"
            )
        factor = _positive(_json(scaler).get("scaling_factor"))
        if factor is None:
            raise DataError(f"{scaler}: scaling_factor is no positive number; fetch it again")
        return factor
    raise UserError(
        f"{folder}: normalize_activations={kind!r} divides each row by a number of its own (or needs statistics that "
        f"are not here), which weights cannot take up; only none and expected_average_only_in can be imported"
    )


def _hook(metadata: dict[str, Any]) -> tuple[str, str]:
    model, hook = metadata.get("model_name"), metadata.get("hook_name", metadata.get("hook_point"))
    return str(model or ""), str(hook or "")


def _gemma_names(location: str) -> tuple[str, str]:
    repo = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att)", location)
    layer = re.search(r"layer_(\d+)", location)
    if not repo or not layer:
        return "", ""
    place = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}[repo[3]]
    return f"gemma-2-{repo[1]}{'-it' if repo[2] == 'it' else ''}", f"blocks.{layer[1]}.{place}"


def _concepts(folder: Path) -> list[str]:
    path = folder / "concepts.json"
    names = _json(path).get("concepts") if path.is_file() else []
    return [str(name) for name in names] if isinstance(names, list) else []


def _gains(folder: Path) -> dict[str, float]:
    path = folder / "concepts.json"
    found = _dict(_json(path).get("gains")) if path.is_file() else {}
    return {str(name): gain for name, value in found.items() if (gain := _positive(value)) is not None}


def _written(folder: Path, source: Source) -> Tensor | None:
    path = folder / WRITTEN
    if not path.is_file():
        return None
    source.facts.files |= sha256_of(folder, WRITTEN)
    return read_written(path, source.slots, source.width)


def read_written(path: Path, slots: int, width: int) -> Tensor:
    """W_write [m, D] fp32, raw, of a safetensors file: what the first m slots write where they are steered. DataError
    where it is of another dictionary, or not finite."""
    store = SafetensorsStore(path)
    shape = store.shape("W_write")
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= slots:
        raise DataError(f"{path}: W_write has shape {shape}, but there are {slots} slots {width} wide")
    return finite(store.whole("W_write"), store, "W_write")


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], "fetch it again")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _positive(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18
    return float(value) if known else None


def _k(value: Any, slots: int, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= slots:
        raise DataError(f"{path}: k is {json.dumps(value)[:40]}, not a number of slots between 1 and {slots}")
    return value


FOLDERS: dict[str, Callable[[Path, str], Source]] = {SAELENS: saelens, SPARSIFY: sparsify, OWN: own_export}
