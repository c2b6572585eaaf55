"""Steering: chosen slots of a dictionary are changed in a running model, and read back token by token.

    with steer(model, load("runs/demo"), {"employer": 2.0, "birth_city": 0}) as s:
        model.generate(**tokenizer(prompts, return_tensors="pt"))
    s.trace["employer"]

h becomes h + (z' - z) W_dec over the chosen slots alone: what the dictionary does not reconstruct stays, and no other
slot is computed. Where a dictionary says what its slots write (ConceptDictionary.written), that is in place of W_dec.

Shapes: B sequences, T tokens, D model width, m chosen slots.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.dictionary import BankWeights, ConceptDictionary, normalisation
from trainer.errors import UserError
from trainer.language_model import Tokens, edit_tokens
from trainer.pretrained import Trained

log = logging.getLogger(__name__)

Mode = Literal["set", "add", "scale", "suppress", "clamp", "ablate"]
Where = Literal["prompt_end", "all", "generated"]
# One number, or one for each sequence of the batch; nan leaves a sequence as it is.
Strength = float | Sequence[float] | Tensor

# From activations z and strengths v, both broadcast to the same shape, to what z becomes.
MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "set": lambda z, v: v.expand_as(z),
    "add": lambda z, v: (z + v).clamp_min(0.0),  # a code has no negative entries
    "scale": lambda z, v: z * v,
    "suppress": torch.minimum,
    "clamp": lambda z, v: torch.where(z > 0, v, z),
    "ablate": lambda z, v: torch.zeros_like(z),
}
WHERE = ("prompt_end", "all", "generated")


class SlotEdit:
    """Changes some slots of a dictionary in activations of its hook point.

    Args:
        dictionary: whose slots.
        slots: numbers of the m slots.
        mode: see MODES.
        value: [1 or B, m] fp32 in units of the code; nan leaves an entry as it is.
        device: of the activations.
    """

    def __init__(
        self,
        dictionary: ConceptDictionary,
        slots: Sequence[int],
        mode: str,
        value: Tensor,
        device: torch.device | str,
    ):
        rows = dictionary.steered_rows(slots)
        threshold = None if rows.threshold is None else rows.threshold.to(device)
        self._weights = BankWeights(rows.W_enc.to(device), rows.b_enc.to(device), rows.W_dec.to(device), threshold)
        self._mean, self._scale = dictionary.mean.to(device), dictionary.scale.to(device)
        self._change, self._value = MODES[mode], value.float().to(device)
        self._decoder = self._weights.decoder() * self._scale

    @property
    def rows(self) -> Tensor:
        """What an activation of 1 writes, in raw units, [m, D] fp32."""
        return self._decoder

    @torch.no_grad()
    def read(self, h: Tensor) -> Tensor:
        """Activations z [..., m] fp32 of the chosen slots on raw activations h [..., D]."""
        x = normalisation.normalise(h, self._mean, self._scale)
        return BankWeights.encode(self._weights, x.flatten(0, -2)).unflatten(0, h.shape[:-1])

    @torch.no_grad()
    def changed(self, z: Tensor) -> Tensor:
        """What z [B, m] or [B, T, m] becomes."""
        value = self._value if z.ndim == 2 else self._value[:, None]
        return torch.where(value.isnan(), z, self._change(z, value))

    @torch.no_grad()
    def difference(self, z: Tensor, changed: Tensor) -> Tensor:
        """What is added to raw activations [..., D] fp32."""
        return (changed - z) @ self._decoder

    def __call__(self, h: Tensor) -> Tensor:
        """Raw activations [B, D] fp32 with the slots changed."""
        z = self.read(h)
        return h.float() + self.difference(z, self.changed(z))


@dataclass
class Steering:
    """What a model did while it was steered: the newest sequences that it read, token by token.

    trace: slot -> activations [B, T] fp32, as the model wrote them, before the change. steered: what they became. T
    counts the tokens of the prompt and those that were generated but the last, which the model has not read. nan at
    padding.
    """

    names: list[str]
    _read: list[Tensor] = field(default_factory=list)
    _set: list[Tensor] = field(default_factory=list)

    @property
    def trace(self) -> dict[str, Tensor]:
        """See the class."""
        return self._named(self._read)

    @property
    def steered(self) -> dict[str, Tensor]:
        """See the class."""
        return self._named(self._set)

    def record(self, tokens: Tokens, z: Tensor, changed: Tensor) -> None:
        """Keep the activations z, and what they became, [B, T, m] of a forward pass."""
        if tokens.start == 0:
            self._read.clear()
            self._set.clear()
        for kept, values in ((self._read, z), (self._set, changed)):
            kept.append(values if tokens.real is None else values.masked_fill(~tokens.real[..., None], torch.nan))

    def _named(self, parts: list[Tensor]) -> dict[str, Tensor]:
        if not parts:
            raise UserError("the model has read nothing yet; call it inside of `with steer(...)`")
        return dict(zip(self.names, torch.cat(parts, dim=1).unbind(dim=2), strict=True))


@contextmanager
def steer(
    model: Any,
    dictionary: Trained,
    edits: Mapping[str, Strength] | Mapping[int, Strength] | Sequence[str | int],
    *,
    mode: Mode = "set",
    where: Where = "prompt_end",
    read: Sequence[str | int] = (),
) -> Iterator[Steering]:
    """While active, slots of the dictionary are changed in `model`, at its hook point.

    Args:
        model: a causal language model of transformers.
        dictionary: of `trainer.load`.
        edits: concept, or number of any slot -> strength: a number, or one for each sequence of the batch, where nan
            leaves a sequence as it is. For `ablate` names alone. A strength of 1 is the gain of the concept: the mean
            activation of its slot where the concept is there. Of a slot without a known gain it is 1.
        mode: set: the activation becomes strength * gain. add: strength * gain is added to it. scale: it is multiplied
            by the strength. suppress: it becomes strength * gain where it is more. clamp: it becomes strength * gain
            where it is active. ablate: it becomes 0.
        where: prompt_end: at the last token of each prompt. all: at every token. generated: at the tokens after the
            prompt.
        read: further slots to be read back.

    Prompts may be padded on either side if the model is given their attention mask. Contexts may be nested; the inner
    one reads what the outer one wrote. Raises UserError for names, modes and strengths that cannot be, and for a model
    of another width.
    """
    for word, known, what in ((mode, MODES, "mode"), (where, WHERE, "where")):
        if word not in known:
            raise UserError(f"{what}={word!r} is unknown; use one of {', '.join(known)}")
    if isinstance(edits, Mapping) == (mode == "ablate"):
        shape = "a list of slots" if mode == "ablate" else "slot -> strength"
        raise UserError(f"mode={mode!r} takes {shape}, not {edits!r:.100}")
    values = edits if isinstance(edits, Mapping) else dict.fromkeys(edits, 0.0)
    names: list[str | int] = list(dict.fromkeys([*values, *read]))
    slots = [dictionary.slot(name) for name in names]
    if not slots or len(set(slots)) < len(slots):
        raise UserError(f"name at least one slot, and each once; got {', '.join(map(str, names)) or 'none'}")
    value = _strengths(dictionary, names, values, raw=mode in ("scale", "ablate"))
    edit = SlotEdit(dictionary.dictionary, slots, mode, value, model.device)
    steering, rows = Steering([str(name) for name in names]), len(value)

    def at_tokens(h: Tensor, tokens: Tokens) -> Tensor:
        if h.shape[-1] != dictionary.width:
            here = f"{dictionary.hook_point} of this model is {h.shape[-1]} wide"
            raise UserError(
                f"{here}, the dictionary {dictionary.width}; it is of {dictionary.model or 'another model'}"
            )
        if rows not in (1, len(h)):
            raise UserError(f"strengths are given for {rows} sequences, the model reads {len(h)}")
        z = edit.read(h)
        place = _place(where, tokens, h.shape[1])
        changed = z if place is None else torch.where(place[..., None], edit.changed(z), z)
        steering.record(tokens, z, changed)
        if place is None:
            return h
        return (h.float() + edit.difference(z, changed)).to(h.dtype)

    with edit_tokens(model, dictionary.hook_point, at_tokens):
        yield steering


def _place(where: Where, tokens: Tokens, count: int) -> Tensor | None:
    """Which of the `count` tokens of a pass are changed, [B or 1, T] bool; None for none of them."""
    if where == "prompt_end":
        return None if tokens.start else tokens.columns(count) == tokens.last[:, None]
    if where == "generated" and tokens.start + count <= tokens.prompt:
        return None
    return tokens.columns(count)[None] >= (tokens.prompt if where == "generated" else 0)


def _strengths(dictionary: Trained, names: Sequence[str | int], values: Mapping[Any, Strength], *, raw: bool) -> Tensor:
    """Values [1 or B, m] in units of the code, nan for slots that are only read."""
    unknown = [str(name) for name in values if name not in dictionary.gains]
    if unknown and not raw:
        log.warning(
            "no gain is known of %s: a strength of 1 is an activation of 1",
            ", ".join(unknown),
        )
    columns = []
    for name in names:
        try:
            column = torch.as_tensor(values.get(name, torch.nan), dtype=torch.float32).flatten().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"the strength of {name} is {values[name]!r:.80}, no number or list of them") from error
        if bool(column.isinf().any()):
            raise UserError(f"the strength of {name} is not finite")
        columns.append(column if raw else column * dictionary.gains.get(str(name), 1.0))
    rows = max((len(column) for column in columns), default=1)
    if bad := [str(n) for n, column in zip(names, columns, strict=True) if len(column) not in (1, rows)]:
        raise UserError(f"{', '.join(bad)}: as many strengths as other slots have, {rows}, or one for all sequences")
    return torch.stack([column.expand(rows) for column in columns], dim=1) if columns else torch.zeros(1, 0)
