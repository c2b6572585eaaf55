"""The optimizer of a run: its configuration and how it is built."""

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.kernels import native
from trainer.kernels.gradients import noted_square, split_noted
from trainer.private import norms_of

log = logging.getLogger(__name__)

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Least and most of numbers that AdamW can work with; clip beyond fp32 would be infinite.
BOUNDS = {
    "lr": (0, 1e3),
    "weight_decay": (0, 1e3),
    "clip": (0, 1e30),
    "warmup": (0, 1 << 50),
    "accumulate": (1, 1 << 30),
}
MOMENTS = ("exp_avg", "exp_avg_sq")  # names of AdamW's state, in memory and in checkpoints


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    The rate rises linearly over the first `warmup` steps of each stage and falls linearly to 0 over the last `decay`
    share of the run.
    """

    lr: float = 1e-3  # largest rate
    betas: tuple[float, float] = (0.9, 0.999)  # of the two moments
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled, times the rate
    clip: float = 1.0  # largest global gradient norm; 0 = off
    warmup: int = 100  # steps at the start of each stage
    decay: float = 0.2  # last share of the run
    accumulate: int = 1  # backward passes per step
    state: str = "fp32"  # moments: fp32 | bf16 (half their memory, rounded at random)

    def validate(self) -> None:
        """Raise UserError for a number that cannot be."""
        for name, (low, most) in BOUNDS.items():
            if not low <= getattr(self, name) <= most:
                raise UserError(f"optim.{name}={getattr(self, name)} must be between {low:g} and {most:g}")
        if not 0 < self.eps <= 1:
            raise UserError(f"optim.eps={self.eps} must be above 0, at most 1")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"optim.betas={list(self.betas)} must be two numbers in [0, 1)")
        if self.state not in STATE_DTYPES:
            raise UserError(f"optim.state={self.state!r} is unknown; use fp32 or bf16")
        if not 0 <= self.decay <= 1:
            raise UserError(f"optim.decay={self.decay} must be between 0 and 1")

    def refuse_sharding(self, zero_stage: int) -> None:
        """Raise UserError when the state cannot be kept under this ZeRO stage (0 = not ZeRO).

        What is rounded at random depends on the place of an element in its parameter, which a shard does not know.
        """
        if zero_stage and self.state != "fp32":
            raise UserError(
                f"optim.state={self.state} does not work with parallel.strategy=zero{zero_stage}; "
                f"set optim.state=fp32, or use single, ddp or dictionary"
            )


class ScaledAdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step takes a scale for the gradients, so that clipping needs no pass over them.

    With fp32 moments, state and update are those of torch's fused AdamW; on CPU, with the compiled operators at hand,
    the pass is ours (trainer/kernels/adamw.cpp). With bf16 moments (`state_dtype`) an update computes in fp32 and
    rounds the moments up or down at random, in proportion: they are right on average, where rounding to the nearest
    would lose every change below 1/256 (exp_avg_sq changes by 1/1000 a step). The randomness is a hash of step and
    element, so that every strategy, and a resumed run, rounds alike.
    """

    def __init__(self, *args: Any, state_dtype: torch.dtype = torch.float32, **options: Any):
        super().__init__(*args, **options)
        self.state_dtype = state_dtype

    def make_state(self, parameter: Tensor, updates: int = 0) -> None:
        """Moments of 0 after `updates` steps."""
        self.state[parameter] = {
            "step": torch.tensor(float(updates), device=parameter.device),  # torch's fused AdamW wants it there
            **{key: torch.zeros_like(parameter, dtype=self.state_dtype) for key in MOMENTS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but moments get the dtype of this optimizer."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in MOMENTS:
                state[key] = state[key].to(self.state_dtype)

    @torch.no_grad()
    def step_where(self, made: Tensor, divisor: Tensor) -> None:
        """Update where `made` says so, with gradients over `divisor`: scalars on the device, which nobody reads.

        Gradients are scaled on the way.
        """
        if self.state_dtype != torch.float32:
            self._step_bf16_where(made, 1.0 / divisor)
            return
        # torch's fused kernels divide gradients by the one and leave everything as it is where the other is not 0.
        self.grad_scale, self.found_inf = divisor, torch.empty_like(divisor)
        torch.logical_not(made, out=self.found_inf)
        super().step()
        del self.grad_scale, self.found_inf

    def _step_bf16_where(self, made: Tensor, grad_scale: Tensor) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += made
                old = [t.clone() for t in (p, state["exp_avg"], state["exp_avg_sq"])]
                factors = Factors.of(group, state["step"].clamp_min(1), grad_scale)
                tensors = ([p], [p.grad], [state["exp_avg"]], [state["exp_avg_sq"]])
                step_bf16(*tensors, factors, _mixed(state["step"].long()))
                for now, before in zip((p, state["exp_avg"], state["exp_avg_sq"]), old, strict=True):
                    now.copy_(torch.where(made, now, before))

    @torch.no_grad()
    def step(self, closure: None = None, *, grad_scale: float = 1.0) -> None:  # type: ignore[override]
        """Update with gradients times `grad_scale`; the gradients stay as they are."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        compiled = all(_plain(p) for p in parameters) and _compiled()
        if compiled or self.state_dtype != torch.float32:
            self._own_step(grad_scale, compiled)
            return
        if grad_scale == 1.0 or not parameters:
            super().step()
            return
        self.step_where(torch.tensor(True), torch.tensor(1.0 / grad_scale))

    def _own_step(self, grad_scale: float, compiled: bool) -> None:
        for group in self.param_groups:
            by_step: dict[float, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.make_state(p)
                self.state[p]["step"] += 1
                by_step.setdefault(float(self.state[p]["step"]), []).append(p)
            for step, params in by_step.items():
                tensors = (
                    params,
                    [p.grad.contiguous() for p in params if p.grad is not None],
                    [self.state[p]["exp_avg"] for p in params],
                    [self.state[p]["exp_avg_sq"] for p in params],
                )
                factors = Factors.of(group, step, grad_scale)
                if self.state_dtype == torch.float32:
                    torch.ops.alignsae.adamw(*tensors, factors)
                elif compiled:
                    torch.ops.alignsae.adamw_bf16(*tensors, factors, _seed(int(step)))
                else:
                    step_bf16(*tensors, factors, _seed(int(step)))


class Factors(NamedTuple):
    """What an update multiplies with, computed once for every way to take it; the order is that of adamw.cpp.

    b1, b2 are the betas and c1, c2 what is left to 1; decay of the weights; size of the update, with the correction of
    exp_avg's bias; root, the correction of sqrt(exp_avg_sq)'s; eps; scale of the gradients.
    """

    b1: float
    c1: float
    b2: float
    c2: float
    decay: float
    size: float | Tensor
    root: float | Tensor
    eps: float
    scale: float | Tensor

    @classmethod
    def of(cls, group: dict[str, Any], step: float | Tensor, grad_scale: float | Tensor) -> "Factors":
        """For a parameter group at an update, counted from 1; as tensors where only a device knows which it is."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        square = 1 - beta2**step
        return cls(
            b1=beta1,
            c1=1 - beta1,
            b2=beta2,
            c2=1 - beta2,
            decay=1 - lr * group["weight_decay"],
            size=lr / (1 - beta1**step),
            root=1 / (square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)),
            eps=group["eps"],
            scale=grad_scale,
        )


def step_bf16(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factors: Factors,
    seed: int | Tensor,
) -> None:
    """AdamW with bf16 moments in plain PyTorch, for any device: bit for bit `adamw_bf16` of kernels/adamw.cpp."""
    f = factors
    for p, g, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        grad = g * f.scale
        first, second = exp_avg.float() * f.b1 + grad * f.c1, exp_avg_sq.float() * f.b2 + grad * grad * f.c2
        noise = _mixed(torch.arange(p.numel(), device=p.device) + seed).view(p.shape)
        exp_avg.copy_(_rounded(first, noise & 0xFFFF))
        exp_avg_sq.copy_(_rounded(second, noise >> 16))
        deviation = second.double().sqrt().float()  # torch's fp32 square root is off by a bit on some CPUs
        p.copy_(p * f.decay - first * f.size / (deviation * f.root + f.eps))


def _seed(step: int) -> int:
    """Where the hash of an update starts; the step itself would only move the noise along by an element."""
    return int(_mixed(torch.tensor(step)))


def _mixed(x: Tensor) -> Tensor:
    """A hash of the low 32 bits of int64 numbers: the finaliser `lowbias32` of the Hash Prospector project."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _rounded(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bf16, up with a probability of the part that is cut off; noise: 16 random bits per element."""
    return ((value.view(torch.int32) + noise.int()) >> 16).to(torch.int16).view(torch.bfloat16)


def _compiled() -> bool:
    """Whether the compiled operators are at hand; says once what is used instead."""
    problem = native.load()
    if problem is not None:
        _warn(problem)
    return problem is None


@functools.cache
def _warn(problem: str) -> None:
    log.warning("AdamW takes plain PyTorch instead of the compiled pass: %s", problem)


def _plain(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu" and parameter.dtype == torch.float32 and parameter.is_contiguous()


def square_norm(gradients: Iterable[Tensor], wait: bool = True) -> Tensor:
    """Sum of squares of all gradients, fp64; those that a kernel noted as it wrote them are not read again.

    Squares may be too large for fp32 where the gradients are not. Without `wait` the device is asked for nothing, and
    at least one gradient has to be there.
    """
    on_device, left = split_noted(gradients)
    total, rest = 0.0, []
    for gradient in left:
        noted = noted_square(gradient)
        if noted is None:
            rest.append(gradient)
        else:
            total += noted
    if not wait:
        norms = norms_of(rest)
        squares = torch.stack([*norms, *on_device])
        squares[: len(norms)].square_()
        return squares.sum() + total if total else squares.sum()
    norm = torch.nn.utils.get_total_norm(rest)
    if not torch.isfinite(norm):
        norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in rest]).norm()
    square = norm.double().square() + total if total else norm.double().square()
    return torch.stack([square, *on_device]).sum() if on_device else square


def build_optimizer(params: Iterable[Tensor], config: OptimConfig) -> ScaledAdamW:
    """AdamW over `params` (fp32 masters) in one pass; `config.lr` is its rate until a schedule sets another."""
    beta1, beta2 = config.betas
    return ScaledAdamW(
        list(params),
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
        state_dtype=STATE_DTYPES[config.state],
    )
