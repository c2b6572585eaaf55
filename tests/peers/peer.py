"""Run by an interpreter that has sae-lens and eai-sparsify: makes their dictionaries and computes with them.

Reads one JSON list a line and answers each with a line, "done" or the error:
["make", KIND, FOLDER, SETTINGS]    a dictionary of KIND with random weights, saved by its own trainer
["train", ROWS, FOLDER]             a BatchTopK dictionary, trained by SAELens's own step on rows [N, D]
["run", KIND, FOLDER, ROWS, OUT]    codes and reconstructions of rows by the trainer that KIND names
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTH, SLOTS = 12, 40


def randomise(module: torch.nn.Module) -> None:
    """Weights of every parameter, from one seed; decoder rows of different norms, thresholds above 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
            if name == "threshold":
                parameter.abs_()


def make(kind: str, folder: Path, settings: dict) -> None:
    """Write one dictionary."""
    if kind == "sparsify":
        from sparsify import SparseCoder, SparseCoderConfig

        coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=SLOTS, **{"k": 5} | settings))
        randomise(coder)
        coder.save_to_disk(folder)
        return
    from sae_lens import saes
    from sae_lens.saes.sae import SAEMetadata

    names = {"model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_post"}
    common = {"d_in": WIDTH, "d_sae": SLOTS, "metadata": SAEMetadata(**names), **settings}
    if kind == "batchtopk":
        sae = saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**{"k": 6.0} | common))
        randomise(sae)
        sae.topk_threshold.fill_(0.7)
        sae.save_inference_model(folder)
        return
    classes = {
        "standard": (saes.StandardSAE, saes.StandardSAEConfig),
        "jumprelu": (saes.JumpReLUSAE, saes.JumpReLUSAEConfig),
        "topk": (saes.TopKSAE, saes.TopKSAEConfig),
    }
    sae_class, config_class = classes[kind]
    sae = sae_class(config_class(**({"k": 5} if kind == "topk" else {}) | common))
    randomise(sae)
    sae.save_model(folder)


def train(rows: Tensor, folder: Path) -> None:
    """SAELens's own BatchTopK training step, for a few hundred steps of plain Adam."""
    from sae_lens import saes
    from sae_lens.saes.sae import SAEMetadata, TrainStepInput

    torch.manual_seed(0)
    metadata = SAEMetadata(model_name="none", hook_name="layer-01")
    config = saes.BatchTopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=SLOTS, k=6.0, metadata=metadata)
    sae = saes.BatchTopKTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(600):
        batch = rows[torch.randint(len(rows), (64,))]
        given = TrainStepInput(
            sae_in=batch, coefficients={}, dead_neuron_mask=None, n_training_steps=step, is_logging_step=False
        )
        loss = sae.training_forward_pass(given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sae.save_inference_model(folder)


@torch.no_grad()
def compute(kind: str, folder: Path, rows: Tensor) -> dict[str, Tensor]:
    """Code [N, S] and reconstruction [N, D]."""
    if kind == "sparsify":
        from sparsify import SparseCoder

        coder = SparseCoder.load_from_disk(folder)
        values, indices, _ = coder.encode(rows)
        code = torch.zeros(len(rows), coder.num_latents).scatter_(1, indices, values)
        return {"code": code, "reconstruction": code @ coder.W_dec + coder.b_dec}
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    code = sae.encode(rows)
    return {"code": code, "reconstruction": sae.decode(code)}


def answer(command: str, *given: Any) -> None:
    """Do what one line asks for."""
    if command == "make":
        make(given[0], Path(given[1]), given[2])
    elif command == "train":
        train(load_file(given[0])["rows"], Path(given[1]))
    else:
        found = compute(given[0], Path(given[1]), load_file(given[2])["rows"])
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, given[3])


def main() -> None:
    """See the module's text."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the packages print is no answer
    for line in sys.stdin:
        try:
            answer(*json.loads(line))
            said = "done"
        except Exception as error:
            said = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(said, file=answers, flush=True)


if __name__ == "__main__":
    main()
