"""Write a dictionary for other programs: raw activations in, raw activations out, normalisation folded into the
weights.

  alignsae export --run runs/demo --out exported/demo --format saelens

saelens      cfg.json and sae_weights.safetensors of architecture `standard`, for SAELens 6 and later
             (SAE.load_from_disk(OUT)): W_enc [D, S], b_enc [S], W_dec [S, D], b_dec [D]
safetensors  dictionary.safetensors: W_enc [S, D], b_enc [S], W_dec [S, D], b_dec [D]; z = ReLU(h W_enc^T + b_enc),
             h_hat = z W_dec + b_dec

Both come with concepts.json, which names the first R slots and says where the activations were taken. What was written
is read again and compared with the dictionary before OUT gets its name.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.checkpoint import load_dictionary
from trainer.dictionary import ConceptDictionary, normalisation
from trainer.errors import UserError
from trainer.files import allow_as_umask, write_result
from trainer.stream import Manifest

WEIGHTS = {"saelens": "sae_weights.safetensors", "safetensors": "dictionary.safetensors"}
TOLERANCE = 1e-4  # of codes and reconstructions, relative to their norm: fp32 in another order of operations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae export`."""
    parser.add_argument("--run", dest="run_dir", type=Path, required=True, help="run or checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--format", choices=tuple(WEIGHTS), default="saelens", help="layout (default: saelens)")


def run(args: argparse.Namespace) -> None:
    """Fold, write, read back, compare, rename."""
    if args.out.exists():
        raise UserError(f"{args.out} already exists; name a folder that does not")
    dictionary, manifest = load_dictionary(args.run_dir)
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tensors = fold(dictionary)
        if args.format == "saelens":
            tensors["W_enc"] = tensors["W_enc"].T.contiguous()
            write_result(partial / "cfg.json", saelens_config(dictionary, manifest))
        write_result(partial / "concepts.json", _concepts(dictionary, manifest))
        save_file(tensors, partial / WEIGHTS[args.format])
        difference = compare(dictionary, partial)
        allow_as_umask(partial)
        partial.rename(args.out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {args.out}: {error}; free some space or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"written: {args.out} ({args.format}, {dictionary.slots} slots); read back, largest difference {difference:.1e}"
    )


@torch.no_grad()
def fold(dictionary: ConceptDictionary) -> dict[str, Tensor]:
    """W_enc [S, D], b_enc [S], W_dec [S, D], b_dec [D] that act on raw activations."""
    mean, scale = dictionary.mean, dictionary.scale
    banks = [normalisation.fold(bank.weights(), mean, scale) for bank in dictionary.all_banks()]
    return {
        **{name: torch.cat([getattr(bank, name) for bank in banks]) for name in ("W_enc", "b_enc", "W_dec")},
        "b_dec": normalisation.fold_output(dictionary.output(torch.zeros_like(mean)), mean, scale),
    }


def saelens_config(dictionary: ConceptDictionary, manifest: Manifest) -> dict[str, Any]:
    """cfg.json of a SAELens 6 inference SAE of architecture `standard`."""
    return {
        "architecture": "standard",
        "d_in": dictionary.width,
        "d_sae": dictionary.slots,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # The version decides how SAELens reads the file: without it, it takes the layout for one of before 6.0.
        "metadata": {"sae_lens_version": "6.0.0", "model_name": manifest.model, "hook_name": manifest.hook_point},
    }


def _concepts(dictionary: ConceptDictionary, manifest: Manifest) -> dict[str, Any]:
    return {
        "concepts": dictionary.concept_names,  # slot r is concepts[r]
        "slots": dictionary.slots,
        "model": manifest.model,
        "hook_point": manifest.hook_point,
        "trained_on": manifest.digest,
    }


@torch.no_grad()
def compare(dictionary: ConceptDictionary, folder: Path) -> float:
    """Largest relative difference of codes and reconstructions between the exported files and the dictionary, on random
    activations of the training data's mean and scale. Raises UserError beyond TOLERANCE."""
    saelens = (folder / WEIGHTS["saelens"]).is_file()
    tensors = load_file(folder / WEIGHTS["saelens" if saelens else "safetensors"])
    encoder = tensors["W_enc"] if saelens else tensors["W_enc"].T
    if saelens and json.loads((folder / "cfg.json").read_text())["d_sae"] != encoder.shape[1]:
        raise UserError(f"{folder}: cfg.json and the weights disagree about the number of slots")
    noise = torch.randn(64, dictionary.width, generator=torch.Generator().manual_seed(0)) / dictionary.width**0.5
    h = dictionary.denormalise(noise)
    code = torch.relu(h @ encoder + tensors["b_enc"])
    pairs = [
        (code, dictionary.encode(h)),
        (code @ tensors["W_dec"] + tensors["b_dec"], dictionary.decode(dictionary.encode(h))),
    ]
    difference = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)
    if not difference <= TOLERANCE:
        raise UserError(f"{folder}: the exported weights differ from the dictionary by {difference:.1e}; not exported")
    return difference
