"""A dictionary as other programs read it: raw activations in and out, normalisation folded into the weights.

Shapes: D model width, R concept slots, S slots, concept slots first.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from trainer.dictionary import BankWeights, ConceptDictionary, joined, normalisation
from trainer.pretrained.source import Facts, rescale

# What SAELens decides the layout of the file by: without it, it reads a layout of before 6.0. Not who trained it.
SAELENS_LAYOUT = "6.0.0"


@torch.no_grad()
def fold(dictionary: ConceptDictionary, unit_norm: bool = False) -> dict[str, Tensor]:
    """W_enc [S, D], b_enc [S], W_dec [S, D], b_dec [D] that act on raw activations; threshold [S] unless all slots are
    relu.

    unit_norm: decoder rows at norm 1, codes multiplied by the norm that they had (rows of 0 stay).
    """
    mean, scale = dictionary.mean, dictionary.scale
    banks = [normalisation.fold(bank.weights(), mean, scale) for bank in dictionary.all_banks()]
    if unit_norm:
        banks = [rescale(bank, _norms(bank)) for bank in banks]
    whole = joined(banks)
    tensors = {"W_enc": whole.W_enc, "b_enc": whole.b_enc, "W_dec": whole.W_dec}
    tensors["b_dec"] = normalisation.fold_output(dictionary.output(torch.zeros_like(mean)), mean, scale)
    return tensors if whole.threshold is None else tensors | {"threshold": whole.threshold}


def written(dictionary: ConceptDictionary, unit_norm: bool = False) -> Tensor | None:
    """What the first m slots write where they are steered, [m, D] raw, for the codes that `fold` leaves; None where
    their decoder rows do."""
    if dictionary.written is None:
        return None
    raw = dictionary.written * dictionary.scale
    return raw / _raw_norms(dictionary, len(raw))[:, None] if unit_norm else raw


@torch.no_grad()
def gains(dictionary: ConceptDictionary, facts: Facts, unit_norm: bool = False) -> dict[str, float]:
    """Concept -> gain, in the units of the codes that `fold` leaves."""
    names = dictionary.concept_names or facts.concepts
    if not unit_norm or not facts.gains:
        return facts.gains
    norms = dict(zip(names, _raw_norms(dictionary, len(names)).tolist(), strict=True))
    return {name: gain * norms[name] for name, gain in facts.gains.items()}


def _raw_norms(dictionary: ConceptDictionary, slots: int) -> Tensor:
    """What `fold` multiplies the codes of the first slots with, for decoder rows at norm 1; [slots]."""
    rows = dictionary.rows(range(slots))
    return _norms(normalisation.fold(rows, dictionary.mean, dictionary.scale))


def _norms(bank: BankWeights) -> Tensor:
    norm = bank.W_dec.norm(dim=1)
    return torch.where(norm > 0, norm, 1.0)


def saelens_config(dictionary: ConceptDictionary, facts: Facts, thresholds: bool) -> dict[str, Any]:
    """cfg.json of a SAELens 6 inference SAE: `jumprelu` where slots have thresholds (SAELens's own name for batchtopk
    too), else `standard`. Its metadata say who trained it."""
    return {
        "architecture": "jumprelu" if thresholds else "standard",
        "d_in": dictionary.width,
        "d_sae": dictionary.slots,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_LAYOUT,
            "sae_lens_training_version": None,  # left out, SAELens would put in its own
            "trainer": trainer_name(),
            "model_name": facts.model,
            "hook_name": facts.hook_point,
            **named(dictionary, facts),
        },
    }


def named(dictionary: ConceptDictionary, facts: Facts) -> dict[str, Any]:
    """Names of the concept slots and how the dictionary was trained, for both formats."""
    training = {**facts.training, "gate": dictionary.form.gate}
    position = training.pop("token_position", "")
    if facts.format != "alignsae":
        training["trained_by"] = facts.format
    if dictionary.form.gate == "batch_topk":
        training["k"] = dictionary.form.k
    # An imported dictionary has its names in the facts; all its slots are free ones.
    return {
        "concepts": dictionary.concept_names or facts.concepts,
        "token_position": position or None,
        "training": training,
    }


def trainer_name() -> str:
    """Name and version of this program."""
    try:
        return f"alignsae {version('alignsae')}"
    except PackageNotFoundError:
        return "alignsae"
