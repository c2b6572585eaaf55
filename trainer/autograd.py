"""Gradients that autograd cannot find by itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Attach(torch.autograd.Function):
    """A scalar 0 whose gradient with respect to the input is known already."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return source.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None


class SumForward(torch.autograd.Function):
    """Sum over ranks forward, identity backward: all ranks compute the same loss from the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream, None
