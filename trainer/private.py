"""Every undocumented name of torch, DeepSpeed and gcsfs that is used here: the one file to adapt when one goes.

pyproject.toml bounds torch and DeepSpeed from above for this reason. DeepSpeed and gcsfs are not imported: their
objects are handed in.
"""

import functools
import inspect
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from trainer.errors import UserError


def reach(owner: Any, name: str, package: str, home: str = "trainer/private.py") -> Any:
    """Attribute `name` of an object of `package`; raises UserError where it is gone: `home` must be adapted."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise UserError(
            f"{package} {version(package)} has no {name}: {home} must be adapted; "
            "install the version of requirements.lock until it is"
        ) from None


def has_avx512_bf16() -> bool:
    """Whether this x86 processor multiplies bf16 itself."""
    return reach(torch.cpu, "_is_avx512_bf16_supported", "torch")()


def has_mkldnn_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this processor, of whatever kind, without emulating it."""
    return torch.backends.mkldnn.is_available() and reach(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", "torch")()


def version_of(tensor: Tensor) -> int:
    """How often the tensor, or another view of its memory, was written in place."""
    return int(reach(tensor, "_version", "torch"))


def norms_of(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor, fp64 scalars, by as few launches as there can be."""
    return list(reach(torch, "_foreach_norm", "torch")(tensors, 2, dtype=torch.float64)) if tensors else []


def limit_groups(limit: timedelta) -> None:
    """Let no process group of this process wait longer than `limit` in a collective, those of meshes too."""
    set_limit = reach(distributed_c10d, "_set_pg_timeout", "torch")
    for group in list(reach(reach(distributed_c10d, "_world", "torch"), "pg_map", "torch")):
        set_limit(limit, group)


def zero_masters(optimizer: Any, stage: int) -> list[Tensor]:
    """This rank's flat fp32 tensors that the inner optimizer updates. optimizer: DeepSpeed's, of stage 1, 2 or 3."""
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    return reach(optimizer, name, "deepspeed")


def zero3_weights(optimizer: Any) -> list[Tensor]:
    """This rank's flat tensors that stage 3 computes with, in the order of `zero_masters`; fp32 despite the name."""
    return reach(optimizer, "fp16_partitioned_groups_flat", "deepspeed")


def link_moments(optimizer: Any) -> None:
    """Stages 1 and 2: let parameters find the inner optimizer's moments at once, not at the first step only."""
    reach(optimizer, "_lazy_init_hp_params_optimizer_state", "deepspeed")()


def zero3_shard(parameter: Any) -> Tensor:
    """This rank's flat shard of a parameter under stage 3, padded at the end of the last one."""
    return reach(parameter, "ds_tensor", "deepspeed")


def answer_once(system: Any) -> None:
    """Let a file system of gcsfs make each request once: it repeats requests whatever it is told."""
    system._request = functools.partial(inspect.unwrap(reach(type(system), "_request", "gcsfs")), system)
