"""Memory for gradients, and the sum of squares that travels with it from a kernel to the clipping of the optimizer.

A kernel that writes a gradient has every number of it in a register, so it sums the squares as it goes. Autograd hands
the optimizer the gradient alone; the sum therefore waits beside the gradient's memory, in the pool that
`gradient_buffer` draws from (buffers.cpp), and `noted_square` finds it there by the tensor's storage. It answers only
while the tensor's version is the one that was noted: a second micro-batch that adds to the gradient, a reduction or a
mask raises the version, and the sum is forgotten. So a noted sum is right or absent, and nobody has to say that it
ceased to hold.

On other devices than CPU, and without a compiler, memory is fresh and nothing is ever noted.
"""

import torch
from torch import Tensor

from trainer.kernels import native


def gradient_buffer(weight: Tensor) -> Tensor:
    """Memory for the gradient of an fp32 weight, contents arbitrary: on CPU one that was used before, if any."""
    if _pooled(weight):
        return torch.ops.alignsae.buffer(weight.shape)
    return torch.empty_like(weight)


def note_square(gradient: Tensor, square: float) -> None:
    """Let `square` be the sum of squares of a gradient that was written into a `gradient_buffer`, until it changes."""
    if _pooled(gradient):
        torch.ops.alignsae.note_square(gradient, square)


def noted_square(gradient: Tensor) -> float | None:
    """The sum of squares noted for this gradient; None where none was, or the gradient has changed since."""
    return torch.ops.alignsae.noted_square(gradient) if _pooled(gradient) else None


def _pooled(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and native.load() is None
