"""What a slot writes: the tokens that its decoder row promotes, and the slots that write nearly the same.

Shapes: S slots, n slots at a time, D width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.dictionary import BankWeights, ConceptDictionary
from trainer.errors import UserError
from trainer.kernels import usable_precision

CHUNK = 256  # slots at a time
COARSE = 32  # candidates among which the best are chosen; as many would have to lie within 1/256 of each other
GROUP = 32  # keys of which the largest product is looked at first: a top-k of all would cost more than the product
_NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm")  # what architectures call the norm before the output


class Written(NamedTuple):
    """Tokens by their logits, most promoted and most suppressed: ids and logits, each [n, m]."""

    up: Tensor
    up_logits: Tensor
    down: Tensor
    down_logits: Tensor


def decoder_rows(dictionary: ConceptDictionary) -> Tensor:
    """All decoder rows [S, D] at norm 1, for slots that write something else where they are steered
    (ConceptDictionary.written) that; rows of 0 stay."""
    rows = torch.cat([bank(BankWeights.decoder) for bank in dictionary.all_banks() if bank.slots])
    if dictionary.written is not None:
        rows[: len(dictionary.written)] = dictionary.written
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def logit_lens(model: Any, rows: Tensor, tokens: int) -> Iterator[Written]:
    """The output logits that directions rows [S, D] of the residual stream add, through the final norm's gain, for
    CHUNK slots at a time. Raises UserError for a model of another width or without output embeddings."""
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != rows.shape[1]:
        found = "no output embeddings" if head is None else f"width {head.weight.shape[1]}"
        raise UserError(f"the model has {found}, the dictionary width {rows.shape[1]}; it is of another model")
    norm, products = _final_norm(model), _Products(head.weight.float())
    for part in rows.split(CHUNK):
        x = part.to(head.weight.device, head.weight.dtype)
        # The bias of the norm says nothing about a slot.
        x = x if norm is None else norm(x) - norm(torch.zeros_like(x[:1]))
        products.multiply(x.float())
        yield Written(*products.best(tokens), *products.best(tokens, largest=False))


def _final_norm(model: nn.Module) -> nn.Module | None:
    for name, module in model.named_modules():
        if name.count(".") == 1 and name.rpartition(".")[2] in _NORMS:
            return module
    return None


@torch.no_grad()
def nearest(rows: Tensor, neighbours: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of directions rows [S, D] of norm 1: the slots with the largest cosine, and it, each [n, m], for CHUNK slots at a
    time; a slot is not its own neighbour."""
    products, own = _Products(rows), torch.arange(min(CHUNK, len(rows)), device=rows.device)
    for begin, part in zip(range(0, len(rows), CHUNK), rows.split(CHUNK), strict=True):
        products.multiply(part)
        products.coarse[own[: len(part)], begin + own[: len(part)]] = -torch.inf
        yield products.best(min(neighbours, len(rows) - 1))


class _Products:
    """Products of directions x [n, D] with keys [V, D], of which the largest or smallest of each row are wanted.

    All are made in bf16 where the processor has it, and the outermost COARSE of them again in fp32.
    coarse: [n, V], of the x that was multiplied last.
    """

    def __init__(self, keys: Tensor):
        self._keys = keys
        self._operand = keys.bfloat16() if usable_precision("bf16", keys.device) == "bf16" else keys
        # One buffer for all chunks: fresh pages would cost as much as the product.
        self._buffer = torch.empty(CHUNK, len(keys), dtype=self._operand.dtype, device=keys.device)
        self.coarse = self._buffer[:0]

    def multiply(self, x: Tensor) -> None:
        """Take directions x [n, D] fp32, n up to CHUNK."""
        self._x, self.coarse = x, self._buffer[: len(x)]
        torch.mm(x.to(self._operand.dtype), self._operand.T, out=self.coarse)

    def best(self, most: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
        """Keys of the largest or smallest products, the outermost first, and these in fp32, each [n, m] on the CPU."""
        near = outermost(self.coarse, COARSE, largest)
        exact = torch.einsum("nd,nkd->nk", self._x, self._keys[near])
        exact.masked_fill_(self.coarse.gather(1, near) == -torch.inf, -torch.inf)  # what was ruled out stays out
        found = exact.topk(min(most, near.shape[1]), dim=1, largest=largest)
        return near.gather(1, found.indices).cpu(), found.values.cpu()


def outermost(scores: Tensor, count: int, largest: bool) -> Tensor:
    """Places [n, count] of the `count` largest or smallest of each row of scores [n, V], in no order that counts.

    They lie in the `count` groups of GROUP places with the outermost maxima: a top-k of maxima, and one of what these
    groups hold.
    """
    rows, keys = scores.shape
    groups = keys // GROUP
    if groups < 2 * count:
        return scores.topk(min(count, keys), dim=1, largest=largest).indices
    outer = torch.maximum if largest else torch.minimum
    # By halves, which is vector code; a reduction over an inner dimension of bf16 is not.
    maxima, half = scores[:, : groups * GROUP], groups * GROUP // 2
    while half >= groups:
        maxima, half = outer(maxima[:, :half], maxima[:, half:]), half // 2
    chosen = maxima.topk(count, dim=1, largest=largest).indices
    members = (chosen[:, None] + groups * torch.arange(GROUP, device=scores.device)[:, None]).flatten(1)
    rest = torch.arange(groups * GROUP, keys, device=scores.device).expand(rows, -1)
    members = torch.cat([members, rest], dim=1)
    return members.gather(1, scores.gather(1, members).topk(count, dim=1, largest=largest).indices)
