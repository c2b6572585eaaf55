"""What `alignsae export` does; its arguments and its help are in tools/parsers."""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.exporting.card import card
from tools.exporting.push import check_name, push
from trainer.dictionary import BankWeights, ConceptDictionary
from trainer.errors import UserError
from trainer.files import allow_as_umask, write_result
from trainer.pretrained import (
    Trained,
    fold,
    gains,
    named,
    read_trained,
    saelens_config,
    trainer_name,
    written,
)
from trainer.pretrained.formats import WRITTEN, read_written
from trainer.tracking import log_model, save_model

WEIGHTS = {"saelens": "sae_weights.safetensors", "safetensors": "dictionary.safetensors"}
WEIGHTS |= {"huggingface": WEIGHTS["saelens"], "mlflow": WEIGHTS["safetensors"]}
LOADER = "trainer.pretrained.scoring"
TOLERANCE = 1e-4  # of pre-activations and reconstructions, relative to their norm: fp32 in another order of operations


def run(args: argparse.Namespace) -> None:
    """Fold, write, read back, compare, rename; then what was asked for beside the folder."""
    check(args)
    trained = read_trained(args.run_dir)
    if args.written:
        dictionary = trained.dictionary
        dictionary.written = read_written(args.written, dictionary.slots, dictionary.width) / dictionary.scale
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        difference = write(args, trained, partial)
        whole = partial
        if args.format == "mlflow":
            whole = partial.with_name(partial.name + ".model")
            shutil.rmtree(whole, ignore_errors=True)
            save_model(whole, partial, LOADER, probe(trained.dictionary)[:2].numpy(), trained.slots)
        allow_as_umask(whole)
        whole.rename(args.out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {args.out}: {error}; free some space or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"written: {args.out} ({args.format}, {trained.slots} slots); read back, largest difference {difference:.1e}")
    if args.push_to_hub:
        print(f"pushed: {push(args.out, args.push_to_hub, args.public)}")
    if args.log_model:
        print(f"logged: {log_model(args.run_dir, args.out, args.run_dir.resolve().name)}")


def check(args: argparse.Namespace) -> None:
    """Raise UserError for what cannot be together, or is no name."""
    for given, name, needed in (
        (args.license, "--license", "huggingface"),
        (args.push_to_hub, "--push-to-hub", "huggingface"),
        (args.log_model, "--log-model", "mlflow"),
    ):
        if given and args.format != needed:
            raise UserError(f"{name} is of another format; add --format {needed}")
    if args.public and not args.push_to_hub:
        raise UserError("--public is of --push-to-hub, which is missing")
    if args.push_to_hub:
        check_name(args.push_to_hub)
    if not re.fullmatch(r"[a-z0-9.\-]*", args.license):
        raise UserError(f"--license {args.license!r} is no identifier such as mit or apache-2.0")
    if args.out.exists():
        raise UserError(f"{args.out} already exists; name a folder that does not")


def write(args: argparse.Namespace, trained: Trained, folder: Path) -> float:
    """The files of a dictionary; returns by how much what is read back differs."""
    tensors = fold(trained.dictionary, args.unit_norm)
    if WEIGHTS[args.format] == WEIGHTS["saelens"]:
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
        write_result(folder / "cfg.json", saelens_config(trained.dictionary, trained.facts, "threshold" in tensors))
    write_result(folder / "concepts.json", concepts(trained, args.unit_norm))
    if args.format == "huggingface":
        write_result(folder / "README.md", card(trained, args.run_dir, args.license, args.push_to_hub or "OWNER/NAME"))
    save_file(tensors, folder / WEIGHTS[args.format])
    if (apart := written(trained.dictionary, args.unit_norm)) is not None:
        save_file({"W_write": apart.contiguous()}, folder / WRITTEN)
    return compare(trained.dictionary, folder)


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


def probe(dictionary: ConceptDictionary) -> Tensor:
    """Random activations [64, D] of the training data's mean and scale."""
    noise = torch.randn(64, dictionary.width, generator=torch.Generator().manual_seed(0)) / dictionary.width**0.5
    return dictionary.denormalise(noise)


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
    h = probe(dictionary)
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
