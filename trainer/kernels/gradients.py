"""Memory for gradients, and the sum of squares that travels with it from a kernel to the clipping of the optimizer.

A kernel that writes a gradient has every number of it in a register, so it sums the squares as it goes. Autograd hands
the optimizer the gradient alone; the sum therefore waits beside the gradient's memory, in the pool that
`gradient_buffer` draws from (buffers.cpp), and `noted_square` finds it there by the tensor's storage. It answers only
while the tensor's version is the one that was noted: a second micro-batch that adds to the gradient, a reduction or a
mask raises the version, and the sum is forgotten. So a noted sum is right or absent, and nobody has to say that it
ceased to hold.

On other devices memory is fresh, several gradients share one storage, and the sum is a tensor for all of them
(`note_squares`), which goes when the storage does. Without a compiler nothing is noted on a CPU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trainer.kernels import native
from trainer.private import version_of


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


@dataclass
class _Note:
    """The sum of squares of gradients of so many elements that share a storage, while their version is this one."""

    version: int
    elements: int
    square: Tensor


_notes: "WeakKeyDictionary[torch.UntypedStorage, _Note]" = WeakKeyDictionary()


def note_squares(pieces: Sequence[Sequence[Tensor]], parts: Tensor) -> None:
    """Let row i of `parts` add up to the squares of the gradients pieces[i], of one storage, until one changes."""
    squares = parts.sum(dim=1, dtype=torch.float64)
    for gradients, square in zip(pieces, squares.unbind(), strict=True):
        first, elements = gradients[0], sum(gradient.numel() for gradient in gradients)
        _notes[first.untyped_storage()] = _Note(version_of(first), elements, square)


def split_noted(gradients: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The sums of squares noted for these gradients, fp64 scalars, and the gradients that they leave out.

    What was noted for several gradients counts where all of them are here.
    """
    gradients = list(gradients)
    if not _notes:  # a storage that is looked at stays in use, so that the pool on a CPU could not give it out again
        return [], gradients
    sharing: dict[int, tuple[_Note | None, list[Tensor]]] = {}
    for gradient in gradients:
        storage = gradient.untyped_storage()
        sharing.setdefault(storage.data_ptr(), (_notes.get(storage), []))[1].append(gradient)
    squares, rest = [], []
    for note, those in sharing.values():
        there = sum(gradient.numel() for gradient in those)
        if note is not None and there == note.elements and all(version_of(g) == note.version for g in those):
            squares.append(note.square)
        else:
            rest.extend(those)
    return squares, rest


def _pooled(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and native.load() is None
