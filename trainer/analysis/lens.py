"""What a slot writes: the tokens that its decoder row promotes, and the slots that write nearly the same.

Shapes: S slots, n slots at a time, D width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.dictionary import BankWeights, ConceptDictionary
from trainer.errors import UserError

CHUNK = 512  # slots at a time
_NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm")  # what architectures call the norm before the output


class Written(NamedTuple):
    """Tokens by their logits, most promoted and most suppressed: ids and logits, each [n, m]."""

    up: Tensor
    up_logits: Tensor
    down: Tensor
    down_logits: Tensor


def decoder_rows(dictionary: ConceptDictionary) -> Tensor:
    """All decoder rows [S, D] at norm 1; rows of 0 stay."""
    rows = torch.cat([bank(BankWeights.decoder) for bank in dictionary.all_banks() if bank.slots])
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def logit_lens(model: Any, rows: Tensor, tokens: int) -> Iterator[Written]:
    """The output logits that directions rows [S, D] of the residual stream add, through the final norm's gain, for
    CHUNK slots at a time. Raises UserError for a model of another width or without output embeddings."""
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != rows.shape[1]:
        found = "no output embeddings" if head is None else f"width {head.weight.shape[1]}"
        raise UserError(f"the model has {found}, the dictionary width {rows.shape[1]}; it is of another model")
    norm = _final_norm(model)
    for part in rows.split(CHUNK):
        x = part.to(head.weight.device, head.weight.dtype)
        # The bias of the norm says nothing about a slot.
        x = x if norm is None else norm(x) - norm(torch.zeros_like(x[:1]))
        logits = (x @ head.weight.T).float()
        most = min(tokens, logits.shape[1])
        up, down = logits.topk(most, dim=1), logits.topk(most, dim=1, largest=False)
        yield Written(up.indices.cpu(), up.values.cpu(), down.indices.cpu(), down.values.cpu())


def _final_norm(model: nn.Module) -> nn.Module | None:
    for name, module in model.named_modules():
        if name.count(".") == 1 and name.rpartition(".")[2] in _NORMS:
            return module
    return None


@torch.no_grad()
def nearest(rows: Tensor, neighbours: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of directions rows [S, D] of norm 1: the slots with the largest cosine, and it, each [n, m], for CHUNK slots at a
    time; a slot is not its own neighbour."""
    most = min(neighbours, len(rows) - 1)
    for begin in range(0, len(rows), CHUNK):
        cosine = rows[begin : begin + CHUNK] @ rows.T
        cosine[torch.arange(len(cosine)), torch.arange(begin, begin + len(cosine))] = -2.0
        found = cosine.topk(most, dim=1)
        yield found.indices.cpu(), found.values.cpu()
