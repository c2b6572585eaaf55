"""The concept dictionary: a bank of R concept slots and a list of banks of free slots. Knows no parallelism.

Shapes: B rows, D model width, R concepts, n slots of a bank, K free slots, S = R + K.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError


@dataclass
class DictionaryConfig:
    """Size and form of the dictionary."""

    free_slots: int = 100_000
    bank_slots: int = 8_192
    decoder_norm: str = "free"  # free: norm-weighted L1 | unit: rows of norm 1 and plain L1
    value_hidden: int = 256  # hidden width of the value head V
    initial_l0: int | None = None  # active free slots of a row at initialisation; None: D

    def validate(self) -> None:
        """Raise UserError for a size or word that cannot be."""
        if self.free_slots < 1 or self.bank_slots < 1:
            raise UserError(
                f"dictionary.free_slots={self.free_slots} and dictionary.bank_slots={self.bank_slots} must be at least 1"
            )
        if self.initial_l0 is not None and not 1 <= self.initial_l0 <= self.free_slots:
            raise UserError(
                f"dictionary.initial_l0={self.initial_l0} must be between 1 and {self.free_slots} free slots"
            )
        if self.decoder_norm not in ("free", "unit"):
            raise UserError(f"dictionary.decoder_norm={self.decoder_norm!r} is unknown; use free or unit")


class SlotBank(nn.Module):
    """n slots that directly own their weights, so that ZeRO-3 gathers and releases them together.

    W_enc [n, D], b_enc [n], W_dec [n, D], fp32. `last_fired` [n] int64 is the last step at which a slot was active.
    """

    last_fired: Tensor

    def __init__(
        self, slots: int, width: int, *, zero: bool = False, bias: float = 0.0, generator: torch.Generator | None = None
    ):
        super().__init__()
        if zero:
            decoder = torch.zeros(slots, width)
        else:
            decoder = torch.randn(slots, width, generator=generator)
            decoder /= decoder.norm(dim=1, keepdim=True)
        # Encoder starts as the transposed decoder: every slot then reads the direction that it writes.
        self.W_enc = nn.Parameter(decoder.clone())
        self.b_enc = nn.Parameter(torch.full((slots,), bias))
        self.W_dec = nn.Parameter(decoder)
        self.register_buffer("last_fired", torch.zeros(slots, dtype=torch.int64))

    @property
    def slots(self) -> int:
        """Number of slots n (valid under ZeRO-3 too, where the weights may be elsewhere)."""
        return self.last_fired.numel()

    def forward(self, kernel: Callable[..., Any], *args: Any) -> Any:
        """Lend the weights to `kernel(W_enc, b_enc, W_dec, *args)`.

        A call of the module is what ZeRO-3 hooks gather for, so nothing outside may touch the weights in another way.
        """
        return kernel(self.W_enc, self.b_enc, self.W_dec, *args)


class OutputBias(nn.Module):
    """b_dec [D], in a module of its own so that ZeRO-3 gathers it where it is used."""

    def __init__(self, width: int):
        super().__init__()
        self.b_dec = nn.Parameter(torch.zeros(width))

    def forward(self, x_hat: Tensor) -> Tensor:
        """x_hat [B, D] + b_dec."""
        return x_hat + self.b_dec


def initial_bias(width: int, free_slots: int, initial_l0: int | None) -> float:
    """b_enc at which `initial_l0` (None: D) of the free slots are active on a row, at most half of them.

    With x of norm 1 and random encoder rows of norm 1, pre-activations have standard deviation 1 / sqrt(D). About D active slots reconstruct
    something of the size of x; with the usual bias of 0, K / 2 of them overshoot it (K / 2D)-fold and the first steps go into unlearning that.
    """
    share = min(0.5, (width if initial_l0 is None else initial_l0) / free_slots)
    return -NormalDist().inv_cdf(1.0 - share) / width**0.5


def bank_sizes(free_slots: int, bank_slots: int) -> list[int]:
    """Slots of each free bank: equal banks, the last one takes the rest."""
    full, rest = divmod(free_slots, bank_slots)
    return [bank_slots] * full + ([rest] if rest else [])


def decoder_rows(W_dec: Tensor, decoder_norm: str) -> Tensor:
    """The rows [n, D] that the code of a free bank is multiplied with: W_dec itself, or its rows at norm 1."""
    if decoder_norm == "free":
        return W_dec
    return W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)


class ConceptDictionary(nn.Module):
    """R concept slots, K free slots, an output bias, and the normalisation of the activations it was trained on.

    Args:
        width: D.
        concepts: concept names, in slot order (R >= 0).
        config: sizes.
        answers: size A of the answer vocabulary (0 = no value head).
        seed: initialisation; each bank draws from its own generator, so that a bank does not depend on where it lives.
        owned: indices of the free banks that this process holds (None = all).
        on_unit: called with name and module of each unit (see `units`) right after it was made and before the next one is: who loads or
            places weights there never holds the whole dictionary where it was made.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        width: int,
        concepts: Sequence[str],
        config: DictionaryConfig,
        *,
        answers: int = 0,
        seed: int = 0,
        owned: Sequence[int] | None = None,
        on_unit: Callable[[str, nn.Module], object] = lambda name, unit: None,
    ):
        super().__init__()
        config.validate()
        self.config = config
        self.width = width
        self.concept_names = list(concepts)
        self.answers = answers
        self.sizes = bank_sizes(config.free_slots, config.bank_slots)
        self.owned = list(range(len(self.sizes))) if owned is None else list(owned)
        self.concepts = SlotBank(len(self.concept_names), width, zero=True)
        self.banks = nn.ModuleDict()
        self.output = OutputBias(width)
        self.value_head = value_head(len(self.concept_names), config.value_hidden, answers, _generator(seed, -1))
        for name, unit in self.units().items():
            on_unit(name, unit)
        bias = initial_bias(width, config.free_slots, config.initial_l0)
        for i in self.owned:
            bank = SlotBank(self.sizes[i], width, bias=bias, generator=_generator(seed, i))
            on_unit(f"bank-{i:05d}", bank)
            self.banks[f"{i:05d}"] = bank
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @property
    def slots(self) -> int:
        """S, over all ranks."""
        return len(self.concept_names) + self.config.free_slots

    def set_normalisation(self, mean: Sequence[float], scale: float) -> None:
        """Store mean [D] and scale of the raw activations, as the manifest gives them."""
        self.mean.copy_(torch.tensor(mean))
        self.scale.fill_(scale)

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw activations [B, D] of any float dtype -> x [B, D] fp32 of mean squared norm 1."""
        return (raw.float() - self.mean) / self.scale

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return x * self.scale + self.mean

    def free_banks(self) -> Iterator[SlotBank]:
        """The free banks held here, in slot order."""
        yield from self.banks.values()  # type: ignore[misc]

    def all_banks(self) -> Iterator[SlotBank]:
        """Concept bank, then the free banks held here, in slot order."""
        yield self.concepts
        yield from self.free_banks()

    def units(self) -> dict[str, nn.Module]:
        """What a checkpoint and an engine handle one by one: name -> module. Free banks are named `bank-00000`, `bank-00001` ..."""
        units: dict[str, nn.Module] = {"concepts": self.concepts, "output": self.output}
        if self.value_head is not None:
            units["value"] = self.value_head
        return units | {f"bank-{index}": bank for index, bank in self.banks.items()}

    @torch.no_grad()
    def encode(self, raw: Tensor) -> Tensor:
        """Code z [B, S] (fp32, R concept slots first) of raw activations [B, D]. Holds the whole code: for evaluation."""
        x = self.normalise(raw)
        return torch.cat([torch.relu(x @ b.W_enc.T + b.b_enc) for b in self.all_banks()], dim=1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Raw activations [B, D] from a code [B, S]; the inverse normalisation is applied."""
        start = len(self.concept_names)
        x_hat = self.output(z[:, :start] @ self.concepts.W_dec)
        for bank in self.free_banks():
            x_hat += z[:, start : start + bank.slots] @ decoder_rows(bank.W_dec, self.config.decoder_norm)
            start += bank.slots
        return self.denormalise(x_hat)


def value_head(
    concepts: int, hidden: int, answers: int, generator: torch.Generator | None = None
) -> nn.Sequential | None:
    """V: z_concept [B, R] -> answer logits [B, A]; None when there is nothing to predict."""
    if concepts == 0 or answers == 0:
        return None
    head = nn.Sequential(nn.Linear(concepts, hidden), nn.ReLU(), nn.Linear(hidden, answers))
    with torch.no_grad():
        for layer in head:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.zero_()
    return head


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index + 1) % 2**63)
