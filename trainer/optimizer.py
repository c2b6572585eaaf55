"""The optimizer of a run: its configuration and how it is built."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.kernels import native


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    The rate rises linearly over the first `warmup` steps of each stage and falls linearly to 0 over the last `decay`
    share of the run.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest global gradient norm; 0 = off
    warmup: int = 100  # steps at the start of each stage
    decay: float = 0.2  # last share of the run
    accumulate: int = 1  # backward passes per step

    def validate(self) -> None:
        """Raise UserError for a number that cannot be."""
        for name, low in (("lr", 0.0), ("weight_decay", 0.0), ("clip", 0.0), ("warmup", 0), ("accumulate", 1)):
            if not getattr(self, name) >= low:
                raise UserError(f"optim.{name}={getattr(self, name)} must be at least {low}")
        if not self.eps > 0:
            raise UserError(f"optim.eps={self.eps} must be above 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"optim.betas={list(self.betas)} must be two numbers in [0, 1)")
        if not 0 <= self.decay <= 1:
            raise UserError(f"optim.decay={self.decay} must be between 0 and 1")


class ScaledAdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step takes a scale for the gradients, so that clipping needs no pass over them.

    State and numbers are those of torch's fused AdamW. On CPU, with the compiled operators at hand, the pass is ours.
    """

    @torch.no_grad()
    def step(self, closure: None = None, *, grad_scale: float = 1.0) -> None:  # type: ignore[override]
        """Update with gradients times `grad_scale`; the gradients themselves are left as they are on CPU, scaled on CUDA."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(_plain(p) for p in parameters) and native.load() is None:
            self._native_step(grad_scale)
            return
        if grad_scale == 1.0 or not parameters:
            super().step()
            return
        # torch's fused kernels divide gradients by this on the way.
        device = parameters[0].device
        self.grad_scale, self.found_inf = torch.tensor(1 / grad_scale, device=device), torch.tensor(0.0, device=device)
        super().step()
        del self.grad_scale, self.found_inf

    def _native_step(self, grad_scale: float) -> None:
        for group in self.param_groups:
            by_step: dict[float, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                by_step.setdefault(float(state["step"]), []).append(p)
            for step, params in by_step.items():
                torch.ops.alignsae.adamw(
                    params,
                    [p.grad.contiguous() for p in params if p.grad is not None],
                    [self.state[p]["exp_avg"] for p in params],
                    [self.state[p]["exp_avg_sq"] for p in params],
                    step,
                    float(group["lr"]),
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    grad_scale,
                )


def _plain(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu" and parameter.dtype == torch.float32 and parameter.is_contiguous()


def square_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Sum of squares of all gradients, fp64; those that a kernel noted as it wrote them are not read again."""
    total, rest = 0.0, []
    for gradient in gradients:
        noted = _noted(gradient)
        if noted is None:
            rest.append(gradient)
        else:
            total += noted
    square = torch.nn.utils.get_total_norm(rest).double().square()
    return square + total


def _noted(gradient: Tensor) -> float | None:
    if gradient.device.type != "cpu" or native.load() is not None:
        return None
    return torch.ops.alignsae.noted_square(gradient)


def build_optimizer(params: Iterable[Tensor], config: OptimConfig) -> ScaledAdamW:
    """AdamW over `params` (fp32 masters) in one pass; `config.lr` is its rate until a schedule sets another."""
    beta1, beta2 = config.betas
    return ScaledAdamW(
        list(params), lr=config.lr, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
