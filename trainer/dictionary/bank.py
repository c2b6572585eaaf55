"""A bank of slots: weights, encoder, gate, decoder. Everything that a slot computes is spelled here.

Shapes: B rows, D model width, n slots of a bank.
"""

from collections.abc import Callable, Sequence
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from trainer.dictionary.gate import GATES, apply_gate

P = ParamSpec("P")
T = TypeVar("T")


class BankWeights(NamedTuple):
    """The weights of a bank while it lends them: W_enc [n, D], b_enc [n], W_dec [n, D], threshold [n] or None (0), all
    fp32; and what the objective knows about its slots.

    perp_weight [n]: how much they count in the orthogonality term, None: once each. bandwidth: of the pseudo-gradient
    of thresholds, 0 where they are constants; with one, the sparsity term counts active slots. dead [n] bool: slots
    that the term `pull` pulls towards their thresholds, None: none.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    threshold: Tensor | None = None
    decoder_norm: str = "free"
    perp_weight: Tensor | None = None
    bandwidth: float = 0.0
    dead: Tensor | None = None

    def counted(self) -> Tensor:
        """How much each slot counts in the orthogonality term, [n] fp32 from 0 to 1."""
        return torch.ones_like(self.b_enc) if self.perp_weight is None else self.perp_weight

    def pre_activations(self, x: Tensor) -> Tensor:
        """x W_enc^T + b_enc [B, n] fp32; the product is in the dtype of x [B, D]."""
        # The bias is added in fp32: what is trained in it would be lost in the rounding of a bf16 sum.
        return (x @ self.W_enc.to(x.dtype).T).float() + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Code z [B, n] fp32 of normalised activations x [B, D]."""
        return apply_gate(self.pre_activations(x), self.threshold, self.bandwidth)

    def decoder(self) -> Tensor:
        """The rows [n, D] that the code is multiplied with: W_dec, or its rows at norm 1."""
        if self.decoder_norm == "free":
            return self.W_dec
        return self.W_dec / self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def decode(self, z: Tensor) -> Tensor:
        """This bank's share of the reconstruction [B, D] fp32; the product is in the dtype of z [B, n]."""
        return (z @ self.decoder().to(z.dtype)).float()

    def rows(self, index: Tensor) -> "BankWeights":
        """The slots index [m] as a bank of their own, decoder rows as they are used."""
        threshold = None if self.threshold is None else self.threshold[index]
        return BankWeights(self.W_enc[index], self.b_enc[index], self.decoder()[index], threshold)

    def encode_one(self, x: Tensor, slot: Tensor) -> Tensor:
        """Activation [B] fp32 of slot[i] on row x[i] alone; x [B, D] normalised, slot [B] int64."""
        pre = (x * self.W_enc[slot]).sum(dim=1) + self.b_enc[slot]
        return apply_gate(pre, None if self.threshold is None else self.threshold[slot])


def joined(parts: Sequence[BankWeights]) -> BankWeights:
    """Slots of several banks as one; decoder rows as they are used, thresholds where any slot has one."""
    thresholds = None
    if any(part.threshold is not None for part in parts):
        thresholds = torch.cat([torch.zeros_like(p.b_enc) if p.threshold is None else p.threshold for p in parts])
    W_enc, b_enc, W_dec = (torch.cat(t) for t in zip(*((p.W_enc, p.b_enc, p.decoder()) for p in parts), strict=True))
    return BankWeights(W_enc, b_enc, W_dec, thresholds)


class SlotBank(nn.Module):
    """n slots that directly own their weights, so that ZeRO-3 gathers and releases them together.

    W_enc [n, D], b_enc [n], W_dec [n, D], fp32. `last_fired` [n] int64 is the last step at which a slot was active,
    `dependence` [n] fp32 how much it depends on the concepts (following.followed_dependence), `W_write` [n, D] fp32, of
    concept slots alone, what `ConceptDictionary.written` is kept in.

    Args:
        slots: n.
        width: D.
        zero: start from zero weights; else from random directions.
        norm: of encoder and decoder rows.
        bias: value of b_enc.
        gate: name of the gate (gate.GATES).
        decoder_norm: see ChosenForm.
        generator: of the random directions.
        writes: whether there is a W_write, which begins at 0.
    """

    last_fired: Tensor
    dependence: Tensor
    W_write: Tensor

    def __init__(
        self,
        slots: int,
        width: int,
        *,
        zero: bool = False,
        norm: float = 1.0,
        bias: float = 0.0,
        gate: str = "relu",
        decoder_norm: str = "free",
        generator: torch.Generator | None = None,
        writes: bool = False,
    ):
        super().__init__()
        if zero:
            decoder = torch.zeros(slots, width)
        else:
            decoder = torch.randn(slots, width, generator=generator)
            decoder /= decoder.norm(dim=1, keepdim=True) / norm
        # Encoder starts as the transposed decoder: every slot then reads the direction that it writes.
        self.W_enc = nn.Parameter(decoder.clone())
        self.b_enc = nn.Parameter(torch.full((slots,), bias))
        self.W_dec = nn.Parameter(decoder)
        self.gate, self.decoder_norm = GATES[gate], decoder_norm
        for name, value in self.gate.parameters(slots, width).items():
            self.register_parameter(name, nn.Parameter(value))
        for name, value in self.gate.buffers(slots, width).items():
            self.register_buffer(name, value)
        self.register_buffer("last_fired", torch.zeros(slots, dtype=torch.int64))
        self.register_buffer("dependence", torch.ones(slots))
        if writes:
            self.register_buffer("W_write", torch.zeros(slots, width))

    @property
    def slots(self) -> int:
        """Number of slots n (valid under ZeRO-3 too, where the weights may be elsewhere)."""
        return self.last_fired.numel()

    @property
    def jumps(self) -> bool:
        """Whether thresholds are trained: those of such a gate that are not held."""
        return self.gate.jumps and self.W_enc.requires_grad

    def forward(self, use: Callable[Concatenate[BankWeights, P], T], *args: P.args, **options: P.kwargs) -> T:
        """Lend the weights to `use(weights, *args)`.

        A call of the module is what ZeRO-3 hooks gather for, so nothing outside may touch the weights in another way.
        """
        return use(self.weights(), *args, **options)

    @torch.no_grad()
    def begin_at(self, weights: BankWeights) -> None:
        """Copy weights, and thresholds in the way in which the gate keeps them. Before an engine has the bank."""
        new = {"W_enc": weights.W_enc, "b_enc": weights.b_enc, "W_dec": weights.decoder()}
        for name, value in (new | self.gate.tensors_at(weights.threshold)).items():
            getattr(self, name).copy_(value)

    def weights(self) -> BankWeights:
        """The weights as they lie here; whole outside of `forward` only where no engine shards them."""
        return BankWeights(self.W_enc, self.b_enc, self.W_dec, self.gate.threshold(self), self.decoder_norm)

    def encode(self, x: Tensor) -> Tensor:
        """Code z [B, n] fp32 of normalised activations x [B, D]."""
        return self(BankWeights.encode, x)

    def decode(self, z: Tensor) -> Tensor:
        """This bank's share of the reconstruction [B, D] of a code z [B, n]."""
        return self(BankWeights.decode, z)


class OutputBias(nn.Module):
    """b_dec [D], in a module of its own so that ZeRO-3 gathers it where it is used."""

    def __init__(self, width: int):
        super().__init__()
        self.b_dec = nn.Parameter(torch.zeros(width))

    def forward(self, x_hat: Tensor) -> Tensor:
        """x_hat [B, D] + b_dec."""
        return x_hat + self.b_dec
