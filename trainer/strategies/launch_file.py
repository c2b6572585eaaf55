"""What a file given to `accelerate launch` says about the work."""

import os
from dataclasses import dataclass

from trainer.errors import UserError


@dataclass(frozen=True)
class LaunchFile:
    """A ZeRO strategy or "", dictionary ranks, and whether the optimizer state is offloaded."""

    strategy: str = ""
    dictionary_ranks: int = 1
    offload: bool = False


def launch_file() -> LaunchFile:
    """Read the environment that `accelerate launch --config_file launch/accelerate/X.yaml` sets; empty under torchrun.

    Raises UserError for a launch file that leaves the stage to a DeepSpeed file.
    """
    env = os.environ
    if path := env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise UserError(
            f"deepspeed_config_file={path} of the launch file is not read; write zero_stage there and give parallel.deepspeed={path}"
        )
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0") if env.get("ACCELERATE_USE_DEEPSPEED") == "true" else "0"
    parallel = env.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true"
    return LaunchFile(
        strategy=f"zero{stage}" if stage in ("1", "2", "3") else "",
        dictionary_ranks=int(env.get("PARALLELISM_CONFIG_TP_SIZE", 1)) if parallel else 1,
        offload=env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE") == "cpu",
    )
