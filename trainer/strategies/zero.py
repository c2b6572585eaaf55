"""ZeRO 1, 2 and 3: DeepSpeed, built and driven through Accelerate.

Banks are modules that own their parameters, so stage 3 gathers them one by one; its buffers are set to one bank
(deepspeed_settings.py), so that a rank holds its shard and at most two banks.
"""

import logging
import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from trainer import private
from trainer.losses import LossWeights
from trainer.objective import AlignObjective
from trainer.optimizer import MOMENTS, OptimConfig, build_optimizer
from trainer.strategies.base import Strategy, UnitState, on_host
from trainer.strategies.deepspeed_settings import engine_config, offloads, read_tuning, sharding_config
from trainer.strategies.layout import Layout
from trainer.sums import MicroBatch
from trainer.topology import Topology


class ZeroStrategy(Strategy):
    """Every rank sees other rows and updates its share of every bank.

    Args:
        topology: all ranks are data ranks.
        layout: its stage. Stage 1 shards the optimizer, 2 also gradients, 3 also weights.
    """

    def __init__(self, topology: Topology, layout: Layout):
        self.topology = topology
        self.stage = layout.zero_stage
        self.offload = layout.offload
        self._tuning = read_tuning(layout.deepspeed, self.stage)

        # DeepSpeed's own use of torch and its progress notes are nothing that a user can act on.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed", category=FutureWarning)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

    def place(self, unit: nn.Module) -> None:
        """Stage 3 shards the unit at once, so that a rank never holds more than its share of what was placed, and this
        unit."""
        super().place(unit)
        _empty_to_buffers(unit)
        if self.stage == 3 and any(True for _ in unit.parameters()):
            from deepspeed import zero

            zero.Init(module=unit, config_dict_or_path=sharding_config(self._tuning))

    def prepare(self, objective: AlignObjective, optim: OptimConfig, updates: int) -> None:
        from accelerate import Accelerator, DeepSpeedPlugin

        self.objective = objective
        objective.whole = self.stage < 3
        dictionary = objective.dictionary
        self._units = dictionary.units()
        config = engine_config(self.stage, self.offload, self._tuning, dictionary.form, optim.accumulate)
        optimizer = build_optimizer((p for p in objective.parameters() if p.requires_grad), optim)
        # DeepSpeed has no public way to drop gradients. Without .grad AdamW leaves a parameter and its moments alone.
        optimizer.register_step_pre_hook(self._drop_gradients)
        self._dropping = False
        self._pending = False
        # Launch files may carry DeepSpeed settings of their own; the plugin must see ours alone.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), mixed_precision="no")
        self.engine, _ = accelerator.prepare(objective, optimizer)
        if self.stage == 3 and not self.offload and not offloads("offload_param", self._tuning):
            self._share_masters()
        self._seed_moments(updates)

    def _share_masters(self) -> None:
        """In fp32 a shard and its master are equal at all times: let both be one memory, a fifth less of state."""
        optimizer = self.engine.optimizer
        for master, shard in zip(private.zero_masters(optimizer, 3), private.zero3_weights(optimizer), strict=True):
            master.data = shard

    def _seed_moments(self, updates: int) -> None:
        """Moments of 0 after `updates` steps, as AdamW would create them at its first step."""
        optimizer = self.engine.optimizer
        for shard in private.zero_masters(optimizer, self.stage):
            optimizer.optimizer.state[shard] = {
                "step": torch.tensor(float(updates), device=shard.device),
                **{key: torch.zeros_like(shard) for key in MOMENTS},
            }
        if self.stage < 3:
            private.link_moments(optimizer)

    def forward(self, batch: MicroBatch, weights: LossWeights, align: bool, step: int) -> tuple[Tensor, Tensor]:
        return self.engine(batch, weights, align, step)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)  # the objective scales by the global batch already
        self._pending = last

    def update(self, lr: float, clip: float, allowed: Tensor) -> tuple[Tensor, Tensor]:
        # DeepSpeed's own step waits for the norm on the host, so nothing is lost by asking here.
        norm = math.nan
        if allowed:
            norm = self._step(lr, clip)
        else:
            self.discard()
        found = torch.as_tensor(norm, dtype=torch.float64, device=self.topology.device)
        return found, torch.isfinite(found)

    def _step(self, lr: float, clip: float) -> float:
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
        self._step(0.0, 0.0)
        self._dropping = False

    def _drop_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._dropping:
            for group in optimizer.param_groups:
                for shard in group["params"]:
                    shard.grad = None

    def read(self, unit: str, *, everywhere: bool = False, into: UnitState | None = None) -> UnitState | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        module = self._units[unit]
        mine = everywhere or self._saves(unit)
        old = into or UnitState({}, {}, {})
        weights = {n: on_host(buffer, old.weights.get(n)) for n, buffer in module.named_buffers()} if mine else {}
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        for name, parameter in module.named_parameters():
            whole = self._whole(parameter)
            learning = MOMENTS if parameter.requires_grad else ()
            parts = {key: safe_get_full_optimizer_state(parameter, key) for key in learning}
            if mine:
                weights[name] = on_host(whole, old.weights.get(name))
                for key in learning:
                    moments[key][name] = on_host(parts[key], getattr(old, key).get(name))
        return UnitState(weights, moments["exp_avg"], moments["exp_avg_sq"]) if mine else None

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """A whole parameter, on every rank."""
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter)
        if self.stage < 3:
            return parameter.detach()
        with zero.GatheredParameters([parameter]):  # one that does not learn has no fp32 master
            return parameter.detach().clone()

    def write(self, unit: str, state: UnitState) -> None:
        module = self._units[unit]
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in state.weights:
                    buffer.copy_(state.weights[name])
            for name, parameter in module.named_parameters():
                if name in state.weights:
                    self._write_weight(parameter, state.weights[name])
                for key in MOMENTS:
                    if name in (values := getattr(state, key)):
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
        private.zero3_shard(parameter).copy_(shard)

    def _write_moment(self, parameter: Any, whole: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        whole = whole.to(self.topology.device, torch.float32)
        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, key)
        else:
            safe_set_local_optimizer_state(parameter, self._shard(parameter, whole), key)

    def _shard(self, parameter: Any, whole: Tensor) -> Tensor:
        """This rank's stage-3 shard of a whole tensor, padded with zeros at the end of the last one."""
        size = private.zero3_shard(parameter).numel()
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
