"""The activations of one foreign sample, as a matrix."""

from typing import Any

import numpy as np
import torch

from trainer.errors import DataError, UserError

_FLOATS = (np.float16, np.float32, np.float64)


def vectors(value: Any, suffix: str, name: str | None, where: str) -> torch.Tensor:
    """Activations [n, D] of a decoded member: one array or tensor [D] or [n, D], or several of which `name` is one.

    uint16 is read as the bits of bfloat16. Raises DataError, or UserError where a name is missing.
    """
    if value is None:
        raise DataError(f"{where} has no .{suffix}; name the member with --acts")
    if isinstance(value, dict):
        if name is None and len(value) > 1:
            raise UserError(f"{where}: .{suffix} holds {', '.join(map(str, value))!s:.200}; choose one with --tensor")
        if name is not None and name not in value:
            raise UserError(
                f"{where}: .{suffix} holds {', '.join(map(str, value))!s:.200}, but no --tensor {name!r:.60}"
            )
        value = value[name] if name is not None else next(iter(value.values()), None)
    if isinstance(value, np.ndarray):
        value = _tensor(value)
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    if not floats or value.ndim not in (1, 2) or not value.numel():
        raise DataError(f"{where}: .{suffix} is not one vector or matrix of floating-point numbers")
    return value.reshape(-1, value.shape[-1])


def _tensor(array: np.ndarray) -> torch.Tensor | None:
    if array.dtype == np.uint16:
        return torch.from_numpy(array).view(torch.bfloat16)
    return torch.from_numpy(array) if array.dtype in _FLOATS else None
