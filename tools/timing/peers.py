"""One training step of other trainers on the same rows: `PYTHON peers.py SETTING_JSON` with the PYTHON that has them.

Imports nothing of this project. Prints one JSON object: name -> list of seconds per step, or why it was not timed.
"""

import json
import os
import sys
import time

import torch


def saelens(setting: dict, autocast: bool):
    """SAELens's L1 trainer, its own optimizer and bookkeeping."""
    from sae_lens import SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    config = StandardTrainingSAEConfig(
        d_in=setting["width"], d_sae=setting["slots"], device=setting["device"], dtype="float32", l1_coefficient=0.05
    )
    rows = setting["rows"]
    settings = SAETrainerConfig(10_000 * rows, rows, lr_end=3e-5, device=setting["device"], autocast=autocast)
    trainer = SAETrainer(cfg=settings, sae=StandardTrainingSAE(config), data_provider=iter(()))
    return trainer.step


def sparsify_topk(setting: dict, autocast: bool, fused: bool):
    """sparsify's TopK coder, k = the mean L0, with its trainer's decoder norm control and Adam, or fused Adam.

    Under bf16 autocast, or in fp32.
    """
    if setting["device"] == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = (
            "1"  # its Triton decoder needs a GPU, and it takes it whenever triton is installed
        )
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    config = SparseCoderConfig(num_latents=setting["slots"], k=int(setting["l0"]))
    coder = SparseCoder(setting["width"], config, device=setting["device"])
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=fused or None)

    def step(x):
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(setting["device"].split(":")[0], torch.bfloat16, enabled=autocast):
            coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(setting: dict) -> dict:
    """Time each trainer that is installed."""
    torch.manual_seed(0)
    if setting["threads"]:
        torch.set_num_threads(setting["threads"])
    x = torch.randn(setting["rows"], setting["width"], device=setting["device"]) / setting["width"] ** 0.5
    makers = {
        "saelens_bf16": lambda: saelens(setting, True),
        "saelens_fp32": lambda: saelens(setting, False),
        "sparsify_topk_bf16": lambda: sparsify_topk(setting, True, False),
        "sparsify_topk_bf16_fused_adam": lambda: sparsify_topk(setting, True, True),
        "sparsify_topk_fp32_fused_adam": lambda: sparsify_topk(setting, False, True),
    }
    found: dict[str, list[float] | str] = {}
    for name, make in makers.items():
        if "bf16" in name and "bf16" not in setting["precisions"]:
            found[name] = "left out: this CPU emulates bf16"
            continue
        try:
            step = make()
            times, clock = [], getattr(time, setting["clock"])
            for _ in range(setting["repeats"] + 1):
                began = clock()
                step(x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                times.append(clock() - began)
            found[name] = times[1:]
            del step
        except Exception as error:  # one trainer that fails must not hide the others
            found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
