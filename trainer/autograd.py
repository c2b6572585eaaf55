"""Gradients that autograd cannot find by itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Attach(torch.autograd.Function):
    """A scalar as it is, whose gradient with respect to a source, beside what autograd finds, is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream, upstream * gradient, None


class Idle(torch.autograd.Function):
    """A value as it is; tensors that had no part in it get a gradient of 0, which every engine needs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.shapes = [tensor.shape for tensor in tensors]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        sizes = [shape.numel() for shape in ctx.shapes]
        flat = torch.zeros(sum(sizes), device=upstream.device)
        zeros = (part.view(shape) for part, shape in zip(flat.split(sizes), ctx.shapes, strict=True))
        return upstream, *zeros


class SumForward(torch.autograd.Function):
    """Sum over ranks forward, identity backward: all ranks compute the same loss from the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream, None
