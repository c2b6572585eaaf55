"""Write a dictionary for other programs: raw activations in, raw activations out, normalisation folded into the
weights.

  alignsae export --run runs/demo --out exported/demo --format saelens

saelens      cfg.json and sae_weights.safetensors for SAELens 6 and later (SAE.load_from_disk(OUT)), of architecture
             `standard`, or `jumprelu` for the gates batch_topk and jumprelu: W_enc [D, S], b_enc [S], W_dec [S, D],
             b_dec [D], threshold [S]
safetensors  dictionary.safetensors: W_enc [S, D], b_enc [S], W_dec [S, D], b_dec [D], threshold [S] (0 where there is
             none); pre = h W_enc^T + b_enc, z = pre where pre > threshold and 0 elsewhere, h_hat = z W_dec + b_dec
huggingface  what saelens writes, with a model card (README.md) from the figures in RUN. --push-to-hub OWNER/NAME
             uploads it, to a private repository unless --public is given; `load("hf://OWNER/NAME")` reads it there
mlflow       a model of MLflow, which `mlflow.pyfunc.load_model(OUT).predict` makes codes with, of raw activations; with
             --log-model it is logged with the run's MLflow run, too

All come with concepts.json, which names the first R slots, with the mean activation of each on its own concept (the
unit of `alignsae steer`), and says where the activations were taken. What was written is read again and compared with
the dictionary before OUT gets its name.
"""

import argparse
from pathlib import Path

FORMATS = ("saelens", "safetensors", "huggingface", "mlflow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae export`."""
    parser.add_argument(
        "--run", dest="run_dir", type=Path, required=True, help="folder of a run, a checkpoint, an import or an export"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--format", choices=FORMATS, default="saelens", help="layout (default: saelens)")
    parser.add_argument(
        "--unit-norm", action="store_true", help="decoder rows at norm 1; codes are multiplied by the norms instead"
    )
    parser.add_argument(
        "--written",
        type=Path,
        metavar="FILE",
        help="what the concept slots write where they are steered, as `alignsae swap --learned FILE` learned it",
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="NAME",
        help="of the model card, as the hub spells it (default: none is stated)",
    )
    parser.add_argument("--log-model", action="store_true", help="log the model of --format mlflow with the run")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to this repository")
    parser.add_argument("--public", action="store_true", help="make the repository of --push-to-hub public")
