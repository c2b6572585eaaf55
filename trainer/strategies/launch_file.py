"""What a file given to `accelerate launch`, or its options, say about the work: obeyed or refused, never ignored."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import UserError

OFF = ("", "0", "no", "none", "false", "auto")  # how accelerate writes that something was not asked for


@dataclass(frozen=True)
class LaunchFile:
    """What was asked for.

    strategy: ZeRO strategy or "". dictionary_ranks: 1 for none. offload: of the optimizer state. precision: bf16 or "".
        accumulate, clip:
    numbers, or None. cpu: not to use the GPUs that are there.
    """

    strategy: str = ""
    dictionary_ranks: int = 1
    offload: bool = False
    precision: str = ""
    accumulate: int | None = None
    clip: float | None = None
    cpu: bool = False


def launch_file() -> LaunchFile:
    """Read the environment that `accelerate launch` sets for what it starts; empty under torchrun.

    Raises UserError for settings that this program has no use for, with what to set instead.
    """
    env = os.environ
    _refuse_engines(env)
    zero = env.get("ACCELERATE_USE_DEEPSPEED") == "true"
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0") if zero else "0"
    precision = _asked(env, "ACCELERATE_MIXED_PRECISION")
    if precision not in ("", "bf16"):
        raise UserError(
            f"mixed_precision={precision} of the launch file is not possible: "
            f"weights are fp32 and products run.precision=bf16 or fp32; "
            f"set mixed_precision: 'no' there"
        )
    accumulate = _number(env, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps") if zero else None
    if accumulate is not None and (accumulate != int(accumulate) or accumulate < 1):
        raise UserError(f"gradient_accumulation_steps={accumulate:g} of the launch file must be a whole number from 1")
    return LaunchFile(
        strategy=f"zero{stage}" if stage in ("1", "2", "3") else "",
        dictionary_ranks=_dictionary_ranks(env),
        offload=_offloads(env) if zero else False,
        precision=precision,
        accumulate=int(accumulate) if accumulate is not None and accumulate > 1 else None,
        clip=_number(env, "ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping") if zero else None,
        cpu=_asked(env, "ACCELERATE_USE_CPU") != "",
    )


def _asked(env: Mapping[str, str], name: str) -> str:
    """The variable in lower case; "" where it says that nothing was asked for."""
    value = env.get(name, "").lower()
    return "" if value in OFF else value


def _refuse_engines(env: Mapping[str, str]) -> None:
    if path := env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise UserError(
            f"deepspeed_config_file={path} of the launch file is not read; "
            f"write zero_stage there and give parallel.deepspeed={path}"
        )
    for variable, name, instead in (
        (
            "ACCELERATE_USE_FSDP",
            "FSDP",
            "take launch/accelerate/zero3.yaml (parallel.strategy=zero3), which shards the same",
        ),
        (
            "ACCELERATE_USE_MEGATRON_LM",
            "Megatron-LM",
            "take launch/accelerate/dictionary.yaml (parallel.strategy=dictionary)",
        ),
    ):
        if _asked(env, variable):
            raise UserError(f"the launch file asks for {name}, which this trainer does not use; {instead}")
    if backend := _asked(env, "ACCELERATE_DYNAMO_BACKEND"):
        raise UserError(
            f"dynamo_backend={backend} of the launch file is not possible: "
            f"the kernels are compiled by hand (see `kernel`); "
            f"set dynamo_backend: 'no' there"
        )


def _dictionary_ranks(env: Mapping[str, str]) -> int:
    if env.get("ACCELERATE_USE_PARALLELISM_CONFIG") != "true":
        return 1
    for part, instead in (
        ("DP_SHARD", "take launch/accelerate/zero3.yaml"),
        ("CP", "rows are no sequences; take it out"),
        ("SP", "rows are no sequences; take it out"),
    ):
        if _size(env, part) > 1:
            raise UserError(
                f"parallelism_config_{part.lower()}_size={_size(env, part)} of the launch file is not possible; "
                f"{instead}"
            )
    ranks, replicas = _size(env, "TP"), _size(env, "DP_REPLICATE")
    world = env.get("WORLD_SIZE", "")
    if replicas > 1 and world.isdigit() and int(world) != ranks * replicas:
        raise UserError(
            f"parallelism_config of the launch file: dp_replicate_size={replicas} times tp_size={ranks} "
            f"is not the {world} "
            f"launched processes; take dp_replicate_size out, it follows from the others"
        )
    return ranks


def _size(env: Mapping[str, str], part: str) -> int:
    name = f"PARALLELISM_CONFIG_{part}_SIZE"
    return int(_number(env, name, f"parallelism_config_{part.lower()}_size") or 1)


def _number(env: Mapping[str, str], variable: str, name: str) -> float | None:
    value = _asked(env, variable)
    try:
        return float(value) if value else None
    except ValueError:
        raise UserError(f"{name}={value} of the launch file is no number") from None


def _offloads(env: Mapping[str, str]) -> bool:
    """Whether the optimizer state is asked to be in host memory."""
    device = _asked(env, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
    parameters = _asked(env, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
    if device not in ("", "cpu") or parameters:
        name, value = ("offload_param_device", parameters) if parameters else ("offload_optimizer_device", device)
        raise UserError(
            f"{name}={value} of the launch file is not possible; "
            f"give a DeepSpeed file with parallel.deepspeed (launch/deepspeed/zero3-offload.json), whose device is cpu"
        )
    return device == "cpu"
