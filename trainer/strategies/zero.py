"""ZeRO 1, 2 and 3: DeepSpeed, built and driven through Accelerate.

The engine trains in fp32: the kernels cast from fp32 masters themselves, so a bf16 section would only change the numbers. Banks are modules that
own their parameters, so stage 3 gathers them one by one; its buffers are set to one bank, so that a rank holds its shard and at most two banks.
"""

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from trainer.dictionary import DictionaryConfig
from trainer.losses import LossConfig
from trainer.objective import AlignObjective, Rows
from trainer.optimizer import OptimConfig, build_optimizer
from trainer.strategies.base import Strategy, UnitState, on_host
from trainer.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")
# What matters before there is an engine. Without a bf16 or fp16 section weights stay fp32.
SHARDING = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def deepspeed_config(
    stage: int, offload: bool, width: int, dictionary: DictionaryConfig, accumulate: int
) -> dict[str, Any]:
    """DeepSpeed's settings for a dictionary, whose buffers hold the largest bank."""
    slots = min(dictionary.bank_slots, dictionary.free_slots)
    elements = slots * (2 * width + 1)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    if stage == 3:
        # Prefetch stops behind the tensor that fills the bucket: short of a bank by one tensor it can never pass a whole bank.
        zero |= {
            # Without CUDA nothing runs beside the computation, so there is nothing to gain.
            "stage3_prefetch_bucket_size": elements - slots * width if torch.cuda.is_available() else 0,
            "stage3_max_live_parameters": 2 * elements,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": elements,
        }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; rows are counted by the objective
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # set before each step; DeepSpeed's own default would clip at 1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


class ZeroStrategy(Strategy):
    """Every rank sees other rows and updates its share of every bank.

    Args:
        topology: all ranks are data ranks.
        stage: 1 shards the optimizer, 2 also gradients, 3 also weights.
        offload: optimizer state in host memory.
    """

    def __init__(self, topology: Topology, stage: int, offload: bool):
        self.topology = topology
        self.stage = stage
        self.offload = offload

        # DeepSpeed's own use of torch and its progress notes are nothing that a user can act on.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed", category=FutureWarning)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

    def place(self, unit: nn.Module) -> None:
        """Stage 3 shards the unit at once, so that a rank never holds more than its share of what was placed, and this unit."""
        super().place(unit)
        _empty_to_buffers(unit)
        if self.stage == 3 and any(True for _ in unit.parameters()):
            from deepspeed import zero

            zero.Init(module=unit, config_dict_or_path=SHARDING)

    def prepare(self, objective: AlignObjective, optim: OptimConfig, updates: int) -> None:
        from accelerate import Accelerator, DeepSpeedPlugin

        self.objective = objective
        dictionary = objective.dictionary
        self._units = dictionary.units()
        config = deepspeed_config(self.stage, self.offload, dictionary.width, dictionary.config, optim.accumulate)
        optimizer = build_optimizer(objective.parameters(), optim)
        # DeepSpeed has no public way to drop gradients. Without .grad AdamW leaves a parameter and its moments alone.
        optimizer.register_step_pre_hook(self._drop_gradients)
        self._dropping = False
        self._pending = False
        # Launch files may carry DeepSpeed settings of their own; the plugin must see ours alone.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), mixed_precision="no")
        self.engine, _ = accelerator.prepare(objective, optimizer)
        if self.stage == 3 and not self.offload:
            self._share_masters()
        self._seed_moments(updates)

    def _share_masters(self) -> None:
        """In fp32 a shard and its master are equal at all times: let both be one memory, a fifth less of state."""
        engine = self.engine.optimizer
        for master, shard in zip(engine.fp32_partitioned_groups_flat, engine.fp16_partitioned_groups_flat, strict=True):
            master.data = shard

    def _seed_moments(self, updates: int) -> None:
        """Moments of 0 after `updates` steps, as AdamW would create them at its first step."""
        engine = self.engine.optimizer
        stage3 = self.stage == 3
        for shard in engine.fp32_partitioned_groups_flat if stage3 else engine.single_partition_of_fp32_groups:
            engine.optimizer.state[shard] = {
                "step": torch.tensor(float(updates), device=shard.device),
                **{key: torch.zeros_like(shard) for key in MOMENTS},
            }
        if not stage3:
            engine._lazy_init_hp_params_optimizer_state()  # otherwise linked to the parameters at the first step only

    def forward(self, rows: Rows, weights: LossConfig, align: bool, step: int) -> tuple[Tensor, Tensor]:
        return self.engine(rows, weights, align, step)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)  # the objective scales by the global batch already
        self._pending = last

    def update(self, lr: float, clip: float) -> float:
        self.engine.optimizer.clip_grad = clip
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self._pending = False
        self.engine.step()  # the norm is reduced over ranks; if it is not finite, every rank skips the update
        return float(self.engine.get_global_grad_norm())

    def discard(self) -> None:
        if not self._pending:
            return
        self._dropping = True
        self.update(0.0, 0.0)
        self._dropping = False

    def _drop_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._dropping:
            for group in optimizer.param_groups:
                for shard in group["params"]:
                    shard.grad = None

    def read(self, unit: str, *, everywhere: bool = False, into: UnitState | None = None) -> UnitState | None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        module = self._units[unit]
        mine = everywhere or self._saves(unit)
        old = into or UnitState({}, {}, {})
        weights = {n: on_host(buffer, old.weights.get(n)) for n, buffer in module.named_buffers()} if mine else {}
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        for name, parameter in module.named_parameters():
            whole = safe_get_full_fp32_param(parameter)
            parts = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if mine:
                weights[name] = on_host(whole, old.weights.get(name))
                for key in MOMENTS:
                    moments[key][name] = on_host(parts[key], getattr(old, key).get(name))
        return UnitState(weights, moments["exp_avg"], moments["exp_avg_sq"]) if mine else None

    def write(self, unit: str, state: UnitState) -> None:
        module = self._units[unit]
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in state.weights:
                    buffer.copy_(state.weights[name])
            for name, parameter in module.named_parameters():
                if name in state.weights:
                    self._write_weight(parameter, state.weights[name])
                for key, values in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
                    if name in values:
                        self._write_moment(parameter, values[name], key)

    def _write_weight(self, parameter: Any, whole: Tensor) -> None:
        """Set the fp32 master and what the next forward computes with, which DeepSpeed keeps apart even in fp32."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        whole = whole.to(self.topology.device, torch.float32)
        if self.stage < 3:
            safe_set_full_fp32_param(parameter, whole)
            parameter.copy_(whole)
            return
        shard = self._shard(parameter, whole)
        safe_set_local_fp32_param(parameter, shard)
        parameter.ds_tensor.copy_(shard)

    def _write_moment(self, parameter: Any, whole: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        whole = whole.to(self.topology.device, torch.float32)
        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, key)
        else:
            safe_set_local_optimizer_state(parameter, self._shard(parameter, whole), key)

    def _shard(self, parameter: Any, whole: Tensor) -> Tensor:
        """This rank's stage-3 shard of a whole tensor, padded with zeros at the end of the last one."""
        size = parameter.ds_tensor.numel()
        flat = whole.flatten()[self.topology.rank * size : (self.topology.rank + 1) * size]
        return nn.functional.pad(flat, (0, size - flat.numel()))

    def holds(self, unit: str) -> bool:
        return unit in self._units

    def _saves(self, unit: str) -> bool:
        """Spread the units over the ranks, so that they write at the same time."""
        return list(self._units).index(unit) % self.topology.world == self.topology.rank


def _empty_to_buffers(module: nn.Module) -> None:
    """Without concepts their bank has parameters of no elements, which ZeRO-3 cannot shard."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            if parameter.numel() == 0:
                delattr(child, name)
                child.register_buffer(name, parameter.detach())
