"""DeepSpeed's settings: computed from the banks, and tuned by a JSON file (`parallel.deepspeed`).

The file tunes what costs time or memory but changes no number.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import torch
from msgspec import Meta

from trainer.dictionary import DictionaryForm, bank_unit
from trainer.errors import UserError
from trainer.files import checked, read_json, wrong

Whole = Annotated[int, Meta(ge=0, le=1 << 62, extra=wrong("{field}={value} is not a whole number from 0"))]
YesNo = Annotated[bool, Meta(extra=wrong("{field}={value} is not true or false"))]
Device = Annotated[Literal["cpu", "none"], Meta(extra=wrong("{field}={value} is not possible; use cpu or none"))]


class Offload(TypedDict, total=False):
    """What a file may set of offload_optimizer and offload_param; `device` is needed."""

    device: Device
    pin_memory: YesNo


OffloadSection = Annotated[Offload, Meta(extra=wrong("{field}={value} is not an object"))]


class Tuning(TypedDict, total=False):
    """Keys of zero_optimization that a file may set; what begins with stage3_ is for stage 3 alone."""

    reduce_bucket_size: Whole
    allgather_bucket_size: Whole
    overlap_comm: YesNo
    contiguous_gradients: YesNo
    offload_optimizer: OffloadSection
    offload_param: OffloadSection
    sub_group_size: Whole
    stage3_prefetch_bucket_size: Whole
    stage3_max_live_parameters: Whole
    stage3_max_reuse_distance: Whole


STAGE_3 = ("offload_param", "sub_group_size")
# What else DeepSpeed's files usually hold -> where it is set here.
OWNED = {
    "gradient_clipping": "optim.clip",
    "gradient_accumulation_steps": "optim.accumulate",
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.global_batch",
    "optimizer": "optim",
    "scheduler": "optim.warmup and optim.decay",
    "fp16": "run.precision",
    "bf16": "run.precision",
    "amp": "run.precision",
}


def read_tuning(path: str, stage: int) -> dict[str, Any]:
    """The zero_optimization section of a file for this stage, without `stage`; {} for no file.

    Raises UserError, one line, for a file that is not one, and for a key that is unknown, of another stage or would
    change numbers.
    """
    if not path:
        return {}
    where = f"parallel.deepspeed={path}"
    settings = read_json(Path(path), Any, "see launch/deepspeed", name=where)
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise UserError(f"{where} must be an object with zero_optimization; see launch/deepspeed")
    for key in settings.keys() - {"zero_optimization"}:
        instead = f"; set {OWNED[key]} instead" if key in OWNED else ""
        raise UserError(
            f"{where}: {_plain(key)} would change more than time and memory, or is not known; remove it{instead}"
        )
    tuning = dict(settings["zero_optimization"])
    found = tuning.pop("stage", stage)
    if found != stage:
        raise UserError(
            f"{where} is for stage {found!r:.40}, but parallel.strategy=zero{stage}; give a file of that stage"
        )
    _refuse_unknown(where, tuning, Tuning)
    for key, value in tuning.items():
        if stage < 3 and (key.startswith("stage3_") or key in STAGE_3):
            raise UserError(f"{where}: zero_optimization.{key} is for stage 3, not {stage}; remove it")
        if key.startswith("offload_") and isinstance(value, dict):
            _refuse_unknown(f"{where}: {key}", value, Offload)
            if "device" not in value:
                raise UserError(f"{where}: {key} names no device; use cpu or none")
    try:
        checked(tuning, Tuning)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return tuning


def _plain(key: str) -> str:
    return " ".join(key.split())[:60]


def _refuse_unknown(where: str, values: dict[str, Any], known: type) -> None:
    names = known.__annotations__
    for key in values.keys() - names.keys():
        raise UserError(f"{where}: {_plain(key)} is not one of {', '.join(names)}; remove it")


def offloads(section: str, settings: dict[str, Any]) -> bool:
    """Whether `section` (offload_optimizer or offload_param) of zero_optimization puts something into host memory."""
    return settings.get(section, {}).get("device") == "cpu"


def sharding_config(tuning: dict[str, Any]) -> dict[str, Any]:
    """What matters to stage 3 before there is an engine. Without a bf16 or fp16 section weights stay fp32."""
    zero = {"stage": 3} | {k: v for k, v in tuning.items() if k == "offload_param"}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}


def engine_config(
    stage: int, offload: bool, tuning: dict[str, Any], form: DictionaryForm, accumulate: int
) -> dict[str, Any]:
    """Everything that DeepSpeed is told. Its buffers hold the largest bank; `tuning` wins over what is computed.

    The engine trains in fp32: the kernels cast from fp32 masters themselves, so a bf16 section would only change the
    numbers.
    """
    cuda = torch.cuda.is_available()
    bank = form.elements(bank_unit(0))
    largest = max(math.prod(shape) for shape in form.shapes(bank_unit(0)).values())
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bank,
        "allgather_bucket_size": bank,
        "overlap_comm": cuda,
        "contiguous_gradients": True,
    }
    if stage == 3:
        zero |= {
            # Prefetch stops behind the tensor that fills the bucket: short of a bank by one tensor it can never pass
            # a whole bank.
            # Without CUDA nothing runs beside the computation, so there is nothing to gain.
            "stage3_prefetch_bucket_size": bank - largest if cuda else 0,
            "stage3_max_live_parameters": 2 * bank,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": bank,
        }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; rows are counted by the objective
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # set before each step; DeepSpeed's own default would clip at 1
        "zero_optimization": zero | tuning,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
