"""How analysis is given the rows that it looks at."""

from collections.abc import Callable, Iterable

from torch import Tensor

# Yields (raw activations [B, D], concept [B, M], see trainer.labels), the same rows in every call.
RowSource = Callable[[], Iterable[tuple[Tensor, Tensor]]]
