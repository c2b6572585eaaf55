"""The form of a dictionary: everything about it but the values of its weights.

`ChosenForm` is what a user chooses, and what the section `dictionary` of a configuration sets. `DictionaryForm` adds
what the data give. It is what a checkpoint stores, a resume compares, `alignsae plan` counts and an export describes: a
field added here is known to all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from trainer.dictionary.gate import GATES
from trainer.dictionary.units import CONCEPTS, OUTPUT, VALUE, bank_number, bank_unit
from trainer.errors import UserError

Shapes = dict[str, tuple[int, ...]]
MOST_SLOTS, MOST_WIDTH, MOST_ANSWERS = 1 << 40, 1 << 20, 1 << 31  # more than any file could hold is a damaged number
MOST_BANKS = 1 << 16


@dataclass
class ChosenForm:
    """Size and form of the free slots and of the value head."""

    free_slots: int = 100_000  # K, slots beside those of the concepts
    bank_slots: int = 8_192  # slots that are computed, placed and saved together
    decoder_norm: str = "free"  # free: norm-weighted L1 | unit: rows of norm 1 and plain L1
    value_hidden: int = 256  # hidden width of the value head V
    gate: str = "relu"  # what makes a code of pre-activations: relu | batch_topk | jumprelu
    k: int = 32  # free slots that the gate batch_topk leaves active on a row, on average

    def validate(self) -> None:
        """Raise UserError for a size or word that cannot be."""
        for name, most in (
            ("free_slots", MOST_SLOTS),
            ("bank_slots", MOST_SLOTS),
            ("value_hidden", MOST_WIDTH),
            ("k", MOST_SLOTS),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"dictionary.{name}={getattr(self, name)} must be between 1 and {most}")
        if self.banks > MOST_BANKS:
            raise UserError(
                f"dictionary.bank_slots={self.bank_slots} makes {self.banks} banks of {self.free_slots} free slots; "
                f"use larger banks"
            )
        for name, known in (("decoder_norm", ("free", "unit")), ("gate", tuple(GATES))):
            if getattr(self, name) not in known:
                raise UserError(f"dictionary.{name}={getattr(self, name)!r} is unknown; use {' or '.join(known)}")

    @property
    def banks(self) -> int:
        """Number of free banks."""
        return -(-self.free_slots // self.bank_slots)

    @property
    def bank_sizes(self) -> list[int]:
        """Slots of each free bank: equal banks, the last one takes the rest."""
        full, rest = divmod(self.free_slots, self.bank_slots)
        return [self.bank_slots] * full + ([rest] if rest else [])


@dataclass
class DictionaryConfig(ChosenForm):
    """The section `dictionary` of a configuration: the form, and how its weights begin."""

    begin: str = "random"  # directions in which free slots start: random | rows (of the first batches)
    initial_norm: float = 1.0  # of the encoder and decoder rows of free slots at the start
    initial_l0: int | None = None  # active free slots of a row at initialisation; None: D
    k_fall: int = 100  # steps over which the number that is aimed at falls from initial_l0 to k or target_l0
    # Active free slots of a row that the weight of sparsity follows to with relu and jumprelu; 0: loss.sp stays.
    target_l0: float = 0.0
    start_from: str = ""  # folder that `alignsae import` wrote: the free slots, their number and gate begin there
    freeze: str = "none"  # free: the free slots stay as they began, the rest learns | none

    def validate(self) -> None:
        """Raise UserError for a size or word that cannot be."""
        super().validate()
        if self.initial_l0 is not None and not 1 <= self.initial_l0 <= self.free_slots:
            raise UserError(
                f"dictionary.initial_l0={self.initial_l0} must be between 1 and {self.free_slots} free slots"
            )
        if self.begin not in ("random", "rows"):
            raise UserError(f"dictionary.begin={self.begin!r} is unknown; use random or rows")
        if self.begin == "rows" and self.start_from:
            raise UserError("dictionary.begin=rows does not go with dictionary.start_from; leave one of them out")
        if not 1e-6 <= self.initial_norm <= 1e6:
            raise UserError(f"dictionary.initial_norm={self.initial_norm} must be between 1e-06 and 1e+06")
        if not 0 <= self.k_fall <= MOST_SLOTS:
            raise UserError(f"dictionary.k_fall={self.k_fall} must be between 0 and {MOST_SLOTS}")
        if self.gate == "batch_topk" and self.k > self.free_slots:
            raise UserError(f"dictionary.k={self.k} is more than the {self.free_slots} free slots")
        if self.target_l0 and not 1e-3 <= self.target_l0 <= self.free_slots:
            raise UserError(
                f"dictionary.target_l0={self.target_l0} must be between 0.001 and {self.free_slots} free slots, or 0 "
                f"for off"
            )
        if self.target_l0 and GATES[self.gate].fixes_l0:
            raise UserError(
                f"dictionary.target_l0={self.target_l0} does not go with dictionary.gate={self.gate}, which keeps the "
                f"number of active slots itself; set dictionary.k"
            )
        if self.freeze not in ("none", "free"):
            raise UserError(f"dictionary.freeze={self.freeze!r} is unknown; use none or free")
        if self.freeze == "free" and self.target_l0:
            raise UserError(
                f"dictionary.target_l0={self.target_l0} thins out slots that dictionary.freeze=free holds; leave it out"
            )
        if self.freeze == "free" and not self.start_from:
            raise UserError("dictionary.freeze=free holds slots that know nothing; set dictionary.start_from as well")
        if self.start_from and self.decoder_norm != "free":
            raise UserError("dictionary.decoder_norm=unit does not go with dictionary.start_from; set it to free")

    def form(self, width: int, concepts: Sequence[str] = (), answers: int = 0) -> "DictionaryForm":
        """The form of a dictionary for activations of `width` D, with these concept slots and an answer vocabulary of
        this size."""
        chosen = {field.name: getattr(self, field.name) for field in fields(ChosenForm)}
        return DictionaryForm(**chosen, width=width, concepts=list(concepts), answers=answers)


@dataclass(kw_only=True)
class DictionaryForm(ChosenForm):
    """The whole form.

    width: D. concepts: names, in slot order (R >= 0). answers: size A of the answer vocabulary (0 = no value head).
    """

    width: int
    concepts: list[str]
    answers: int = 0

    def validate(self) -> None:
        """Raise UserError for a size or word that cannot be."""
        super().validate()
        if not 1 <= self.width <= MOST_WIDTH or not 0 <= self.answers <= MOST_ANSWERS:
            raise UserError(f"a dictionary of width {self.width} with {self.answers} answers cannot be")

    @property
    def slots(self) -> int:
        """S = R + K, over all ranks."""
        return len(self.concepts) + self.free_slots

    @property
    def has_value_head(self) -> bool:
        """Whether there is something to predict, and something to predict it from."""
        return bool(self.concepts) and self.answers > 0

    def shared_units(self) -> list[str]:
        """Names of the units that are no free bank."""
        return [CONCEPTS, OUTPUT, *([VALUE] if self.has_value_head else [])]

    def units(self) -> list[str]:
        """Names of all units, in the order in which they are saved."""
        return self.shared_units() + [bank_unit(number) for number in range(self.banks)]

    def shapes(self, unit: str) -> Shapes:
        """Parameters of one unit: name -> shape, fp32."""
        if unit == OUTPUT:
            return {"b_dec": (self.width,)}
        if unit == VALUE:
            hidden, concepts = self.value_hidden, len(self.concepts)
            layers = {"0": (hidden, concepts), "2": (self.answers, hidden)}
            return {f"{k}.{p}": s if p == "weight" else s[:1] for k, s in layers.items() for p in ("weight", "bias")}
        number = bank_number(unit)
        if number is None:
            return self._bank_shapes(len(self.concepts), "relu")
        return self._bank_shapes(min(self.bank_slots, self.free_slots - number * self.bank_slots), self.gate)

    def elements(self, unit: str) -> int:
        """Numbers in the tensors of one unit."""
        return sum(math.prod(shape) for shape in self.shapes(unit).values())

    def to_json(self) -> dict[str, Any]:
        """Content of `dictionary` in state.json."""
        return asdict(self)

    def difference(self, other: "DictionaryForm") -> tuple[str, Any, Any] | None:
        """The first field that differs, as (name, own value, other value); None when the forms are equal."""
        for field in fields(self):
            own, theirs = getattr(self, field.name), getattr(other, field.name)
            if own != theirs:
                return field.name, own, theirs
        return None

    def _bank_shapes(self, slots: int, gate: str) -> Shapes:
        own = {"W_enc": (slots, self.width), "b_enc": (slots,), "W_dec": (slots, self.width)}
        return own | {name: tuple(value.shape) for name, value in GATES[gate].parameters(slots, self.width).items()}
