"""The concept dictionary: a bank of R concept slots and a list of banks of free slots. Knows no parallelism.

Shapes: B rows, D model width, R concepts, n slots of a bank, K free slots, S = R + K.
"""

from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn

from trainer.dictionary import normalisation
from trainer.dictionary.bank import BankWeights, OutputBias, SlotBank, joined
from trainer.dictionary.form import DictionaryForm
from trainer.dictionary.units import CONCEPTS, OUTPUT, VALUE, bank_unit


class ConceptDictionary(nn.Module):
    """R concept slots, K free slots, an output bias, and the normalisation of the activations it was trained on.

    Args:
        form: sizes, names and gate.
        initial_l0, initial_norm: see DictionaryConfig.
        seed: initialisation; each bank draws from its own generator, so that a bank does not depend on where it lives.
        owned: numbers of the free banks that this process holds (None = all).
        on_unit: called with name and module of each unit (see `units`) right after it was made and before the next one
            is: who loads or places weights there never holds the whole dictionary where it was made.

    written: what an activation of 1 of the first m slots writes where they are changed, [m, D] of normalised
    activations, in place of the decoder rows that reconstruct; None: the decoder rows.
    """

    written: Tensor | None

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        form: DictionaryForm,
        *,
        initial_l0: int | None = None,
        initial_norm: float = 1.0,
        seed: int = 0,
        owned: Sequence[int] | None = None,
        on_unit: Callable[[str, nn.Module], object] = lambda name, unit: None,
    ):
        super().__init__()
        form.validate()
        self.form = form
        sizes = form.bank_sizes
        self.owned = list(range(len(sizes))) if owned is None else list(owned)
        self.concepts = SlotBank(len(form.concepts), form.width, zero=True, writes=True)
        self.banks = nn.ModuleDict()
        self.output = OutputBias(form.width)
        self.value_head = value_head(form, _generator(seed, -1))
        for name, unit in self.shared_units().items():
            on_unit(name, unit)
        bias = initial_norm * initial_bias(form, initial_l0)
        for i in self.owned:
            bank = SlotBank(
                sizes[i],
                form.width,
                norm=initial_norm,
                bias=bias,
                gate=form.gate,
                decoder_norm=form.decoder_norm,
                generator=_generator(seed, i),
            )
            on_unit(bank_unit(i), bank)
            self.banks[f"{i:05d}"] = bank
        self.register_buffer("mean", torch.zeros(form.width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("written", None, persistent=False)

    @property
    def width(self) -> int:
        """D."""
        return self.form.width

    @property
    def slots(self) -> int:
        """S, over all ranks."""
        return self.form.slots

    @property
    def concept_names(self) -> list[str]:
        """Names of the concept slots, in slot order."""
        return self.form.concepts

    def set_normalisation(self, mean: Sequence[float], scale: float) -> None:
        """Store mean [D] and scale of the raw activations, as the manifest gives them."""
        self.mean.copy_(torch.tensor(mean))
        self.scale.fill_(scale)

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw activations [B, D] of any float dtype -> x [B, D] fp32 of mean squared norm 1."""
        return normalisation.normalise(raw, self.mean, self.scale)

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return normalisation.denormalise(x, self.mean, self.scale)

    def free_banks(self) -> Iterator[SlotBank]:
        """The free banks held here, in slot order."""
        yield from self.banks.values()  # type: ignore[misc]

    def all_banks(self) -> Iterator[SlotBank]:
        """Concept bank, then the free banks held here, in slot order."""
        yield self.concepts
        yield from self.free_banks()

    def shared_units(self) -> dict[str, nn.Module]:
        """The units that every process holds: name -> module."""
        units: dict[str, nn.Module] = {CONCEPTS: self.concepts, OUTPUT: self.output}
        return units if self.value_head is None else units | {VALUE: self.value_head}

    def units(self) -> dict[str, nn.Module]:
        """What a checkpoint and an engine handle one by one, as far as it is held here: name (units.py) -> module."""
        banks = {bank_unit(i): bank for i, bank in zip(self.owned, self.banks.values(), strict=True)}
        return self.shared_units() | banks

    @torch.no_grad()
    def rows(self, slots: Sequence[int]) -> BankWeights:
        """The weights of some slots, in this order; slot numbers count over all banks, concept slots first."""
        wanted = torch.tensor(slots, dtype=torch.int64)
        ascending = wanted.sort()
        parts, first = [], 0
        for bank in self.all_banks():
            inside = ascending.values[(ascending.values >= first) & (ascending.values < first + bank.slots)]
            if len(inside):
                parts.append(bank(BankWeights.rows, (inside - first).to(bank.b_enc.device)))
            first += bank.slots
        found = joined(parts)
        return found.rows(ascending.indices.argsort().to(found.b_enc.device))

    @torch.no_grad()
    def steered_rows(self, slots: Sequence[int]) -> BankWeights:
        """As `rows`, with what a change of the slots writes as decoder rows."""
        found = self.rows(slots)
        if self.written is None:
            return found
        wanted = torch.tensor(slots, dtype=torch.int64, device=self.written.device)
        apart = wanted < len(self.written)
        instead = self.written[wanted.clamp_max(len(self.written) - 1)]
        return found._replace(W_dec=torch.where(apart[:, None], instead, found.W_dec))

    @torch.no_grad()
    def encode(self, raw: Tensor) -> Tensor:
        """Code z [B, S] (fp32, R concept slots first) of raw activations [B, D].

        Holds the whole code: for evaluation.
        """
        x = self.normalise(raw)
        return torch.cat([bank.encode(x) for bank in self.all_banks()], dim=1)

    @torch.no_grad()
    def reconstruct(self, raw: Tensor) -> Tensor:
        """decode(encode(raw)) of raw activations [B, D], bank by bank: it holds the code of one bank at a time."""
        x = self.normalise(raw)
        x_hat = self.output(torch.zeros_like(x))
        for bank in self.all_banks():
            x_hat += bank.decode(bank.encode(x))
        return self.denormalise(x_hat)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Raw activations [B, D] from a code [B, S]; the inverse normalisation is applied."""
        banks = list(self.all_banks())
        parts = z.split([bank.slots for bank in banks], dim=1)
        x_hat = self.output(banks[0].decode(parts[0]))
        for bank, part in zip(banks[1:], parts[1:], strict=True):
            x_hat += bank.decode(part)
        return self.denormalise(x_hat)


def initial_bias(form: DictionaryForm, initial_l0: int | None) -> float:
    """b_enc at which `initial_l0` (None: D) of the free slots are active on a row, at most half of them, where encoder
    rows have norm 1.

    With x of norm 1 and random encoder rows of norm 1, pre-activations have standard deviation 1 / sqrt(D). About D
    active slots reconstruct something of the size of x; with the usual bias of 0, K / 2 of them overshoot it (K /
    2D)-fold and the first steps go into unlearning that.
    """
    return -NormalDist().inv_cdf(1.0 - initial_share(form, initial_l0)) / form.width**0.5


def initial_share(form: DictionaryForm, initial_l0: int | None) -> float:
    """Share of the rows on which a free slot is active, where `initial_l0` (None: D) of them are on a row; at most a
    half."""
    return min(0.5, (form.width if initial_l0 is None else initial_l0) / form.free_slots)


def value_head(form: DictionaryForm, generator: torch.Generator | None = None) -> nn.Sequential | None:
    """V: z_concept [B, R] -> answer logits [B, A]; None when there is nothing to predict."""
    if not form.has_value_head:
        return None
    concepts, hidden, answers = len(form.concepts), form.value_hidden, form.answers
    head = nn.Sequential(nn.Linear(concepts, hidden), nn.ReLU(), nn.Linear(hidden, answers))
    with torch.no_grad():
        for layer in head:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.zero_()
    return head


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number + 1) % 2**63)
