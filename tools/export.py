"""Write a dictionary for other programs: raw activations in, raw activations out, normalisation folded into the
weights.

  alignsae export --run runs/demo --out exported/demo --format saelens

saelens      cfg.json and sae_weights.safetensors for SAELens 6 and later (SAE.load_from_disk(OUT)), of architecture
             `standard`, or `jumprelu` for the gates batch_topk and jumprelu: W_enc [D, S], b_enc [S], W_dec [S, D],
             b_dec [D], threshold [S]
safetensors  dictionary.safetensors: W_enc [S, D], b_enc [S], W_dec [S, D], b_dec [D], threshold [S] (0 where there is
             none); pre = h W_enc^T + b_enc, z = pre where pre > threshold and 0 elsewhere, h_hat = z W_dec + b_dec
huggingface  what saelens writes, with a model card (README.md) from the figures in RUN: a folder to upload with
             `hf upload OWNER/NAME OUT`, from where `load("hf://OWNER/NAME")` reads it

All come with concepts.json, which names the first R slots, with the mean activation of each on its own concept (the
unit of `alignsae steer`), and says where the activations were taken. What was written is read again and compared with
the dictionary before OUT gets its name.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tools.exporting.card import card
from trainer.dictionary import BankWeights, ConceptDictionary
from trainer.errors import UserError
from trainer.files import allow_as_umask, write_result
from trainer.pretrained import Trained, fold, gains, named, read_trained, saelens_config, trainer_name

WEIGHTS = {"saelens": "sae_weights.safetensors", "safetensors": "dictionary.safetensors"}
WEIGHTS["huggingface"] = WEIGHTS["saelens"]
TOLERANCE = 1e-4  # of pre-activations and reconstructions, relative to their norm: fp32 in another order of operations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae export`."""
    parser.add_argument(
        "--run", dest="run_dir", type=Path, required=True, help="folder of a run, a checkpoint, an import or an export"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--format", choices=tuple(WEIGHTS), default="saelens", help="layout (default: saelens)")
    parser.add_argument(
        "--unit-norm", action="store_true", help="decoder rows at norm 1; codes are multiplied by the norms instead"
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="NAME",
        help="of the model card, as the hub spells it (default: none is stated)",
    )


def run(args: argparse.Namespace) -> None:
    """Fold, write, read back, compare, rename."""
    if args.license and args.format != "huggingface":
        raise UserError("--license is of the model card; add --format huggingface")
    if not re.fullmatch(r"[a-z0-9.\-]*", args.license):
        raise UserError(f"--license {args.license!r} is no identifier such as mit or apache-2.0")
    if args.out.exists():
        raise UserError(f"{args.out} already exists; name a folder that does not")
    trained = read_trained(args.run_dir)
    dictionary = trained.dictionary
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tensors = fold(dictionary, args.unit_norm)
        if WEIGHTS[args.format] == WEIGHTS["saelens"]:
            tensors["W_enc"] = tensors["W_enc"].T.contiguous()
            write_result(partial / "cfg.json", saelens_config(dictionary, trained.facts, "threshold" in tensors))
        write_result(partial / "concepts.json", concepts(trained, args.unit_norm))
        if args.format == "huggingface":
            write_result(partial / "README.md", card(trained, args.run_dir, args.license))
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


def concepts(trained: Trained, unit_norm: bool) -> dict[str, Any]:
    """Content of concepts.json; slot r is concepts[r]."""
    facts = trained.facts
    return {
        **named(trained.dictionary, facts),
        "gains": gains(trained.dictionary, facts, unit_norm),
        "slots": trained.slots,
        "model": facts.model,
        "hook_point": facts.hook_point,
        "trained_on": facts.training.get("data"),
        "trainer": trainer_name(),
    }


@torch.no_grad()
def compare(dictionary: ConceptDictionary, folder: Path) -> float:
    """Largest relative difference of pre-activations and reconstructions between the exported files and the
    dictionary, on random activations of the training data's mean and scale. Raises UserError beyond TOLERANCE, or for
    other thresholds."""
    saelens = (folder / WEIGHTS["saelens"]).is_file()
    tensors = load_file(folder / WEIGHTS["saelens" if saelens else "safetensors"])
    encoder = tensors["W_enc"] if saelens else tensors["W_enc"].T
    if saelens and json.loads((folder / "cfg.json").read_text())["d_sae"] != encoder.shape[1]:
        raise UserError(f"{folder}: cfg.json and the weights disagree about the number of slots")
    expected = fold(dictionary)
    # With --unit-norm the codes are in other units: those of the decoder rows.
    norms = [t["W_dec"].norm(dim=1) for t in (expected, tensors)]
    gain = torch.where(norms[1] > 0, norms[0] / norms[1].clamp_min(1e-30), 1.0)
    noise = torch.randn(64, dictionary.width, generator=torch.Generator().manual_seed(0)) / dictionary.width**0.5
    h = dictionary.denormalise(noise)
    x = dictionary.normalise(h)
    pre = torch.cat([bank(BankWeights.pre_activations, x) for bank in dictionary.all_banks()], dim=1)
    code = dictionary.encode(h)
    pairs = [
        (h @ encoder + tensors["b_enc"], pre * gain),
        ((code * gain) @ tensors["W_dec"] + tensors["b_dec"], dictionary.decode(code)),
    ]
    if "threshold" in expected:
        pairs.append((tensors["threshold"], expected["threshold"] * gain))
    difference = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)
    if not difference <= TOLERANCE:
        raise UserError(f"{folder}: the exported weights differ from the dictionary by {difference:.1e}; not exported")
    return difference
