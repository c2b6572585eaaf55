"""Trains one dictionary of another trainer: `PYTHON peer_training.py SETTING_JSON` with the PYTHON that has it.

Imports nothing of this project. Reads the rows of each step from standard input (8 bytes, little endian: their number
n; then n x D fp32), saves the dictionary as its trainer does, and prints the share of slots that were active on no row
of the last epoch.
"""

import json
import math
import os
import sys

import torch


def batches(setting: dict):
    """Rows [B, D] of one step after the other."""
    for _ in range(setting["steps"]):
        count = int.from_bytes(sys.stdin.buffer.read(8), "little")
        data = bytearray(sys.stdin.buffer.read(4 * count * setting["width"]))
        yield torch.frombuffer(data, dtype=torch.float32).view(count, setting["width"])


def saelens(setting: dict):
    """A step of SAELens's own trainer: rows -> slots [n] bool that were active; and how to save."""
    from sae_lens import SAETrainer, saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    common = {"d_in": setting["width"], "d_sae": setting["slots"], "device": "cpu", "dtype": "float32"}
    common["metadata"] = SAEMetadata(model_name="", hook_name="")
    if setting["trainer"] == "saelens_batchtopk":
        sae = saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(k=float(setting["l0"]), **common))
    else:  # thresholds, band and penalty of SAELens's "tanh" setting
        how = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True, "pre_act_loss_coefficient": 3e-6}
        how |= {"jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 2.0, "l0_coefficient": 1.0}
        sae = saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(**how, **common))
    rows = setting["rows"]
    config = SAETrainerConfig(
        total_training_samples=setting["steps"] * rows,
        train_batch_size_samples=rows,
        lr=setting["lr"],
        lr_end=0.0,
        lr_warm_up_steps=setting["warmup"],
        lr_decay_steps=setting["decay"],
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(x):
        output = trainer.step(x)
        trainer.n_training_steps += 1
        active = output.feature_acts.bool()
        for coefficient in trainer.coefficient_schedulers.values():
            # It has no way to be told an L0 that it keeps: its coefficient is followed to it, as ours of relu is.
            change = active.float().sum(dim=1).mean().item() / setting["l0"] - 1.0
            coefficient.final_value *= math.exp(0.03 * max(-1.0, min(1.0, change)))
        return active.any(dim=0)

    return step, lambda: sae.save_inference_model(setting["out"])


def sparsify(setting: dict):
    """A step of sparsify's TopK coder under Adam, with its trainer's control of the decoder norm."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton decoder needs a GPU
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(setting["width"], SparseCoderConfig(num_latents=setting["slots"], k=setting["l0"]))
    optimizer = torch.optim.Adam(coder.parameters(), lr=setting["lr"], fused=True)
    steps, warmup, decay = setting["steps"], setting["warmup"], max(setting["decay"], 1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / (warmup + 1), max(steps - done, 0) / decay)
    )

    def step(x):
        coder.set_decoder_norm_to_unit_norm()
        output = coder(x)
        output.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        fired = torch.zeros(setting["slots"], dtype=torch.bool)
        fired[output.latent_indices[output.latent_acts > 0]] = True
        return fired

    def save():
        coder.set_decoder_norm_to_unit_norm()
        coder.save_to_disk(setting["out"])

    return step, save


def main(setting: dict) -> float:
    """Train and save; the dead share."""
    torch.manual_seed(setting["seed"])
    step, save = (sparsify if setting["trainer"].startswith("sparsify") else saelens)(setting)
    alive = torch.zeros(setting["slots"], dtype=torch.bool)
    for number, rows in enumerate(batches(setting)):
        fired = step(rows)
        if number >= setting["steps"] - setting["epoch"]:
            alive |= fired
    save()
    return 1.0 - float(alive.double().mean())


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what the packages print is no answer
    print(main(json.loads(sys.argv[1])), file=answers)
