"""state.json: what a run needs beside weights and moments, and which files a checkpoint of it must have."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from trainer.curriculum import CurriculumRecord
from trainer.dictionary import DictionaryForm, bank_number
from trainer.errors import DataError, UserError
from trainer.files import Count, checked, read_json
from trainer.following import LEAST_SPARSITY, MOST_SPARSITY
from trainer.guard import GuardState
from trainer.losses import STAGES

SCHEMA = 1


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: the figure of held-out rows that decides, its value there, and the step."""

    metric: str
    value: float
    step: Count


@dataclass
class RunState:
    """What a run needs beside weights and moments. Random numbers need no state: all come from (seed, step).

    step: batches seen. updates: optimizer steps taken (a skipped update is none). stream: see Plan.state. rows_digest:
    see RowDigest. dictionary: its form. outliers: rows that the steps so far left out for their norms (data.max_norm).
    damage: masked blocks and rows over all ranks. curriculum: under which the
    steps were taken. woken: whether the concept slots have been woken up; both None in checkpoints that do not know.
    freeze: see DictionaryConfig; with `free` the free banks have no moments. sparsity: what the weight of sparsity is
    multiplied with (following.followed_sparsity). gains: mean activation of each concept slot on the rows of its own
    concept, 0 for one without rows; None but at the end of a run and at its best evaluations. best: whose checkpoint is
    kept; None: none is.
    """

    step: Count
    updates: Count
    stage: str
    seed: int
    stream: dict[str, Any]
    rows_digest: int
    dictionary: DictionaryForm
    guard: GuardState = field(default_factory=GuardState)
    outliers: Count = 0
    damage: dict[str, Count] = field(default_factory=dict)
    curriculum: CurriculumRecord | None = None
    woken: bool | None = None
    freeze: str = "none"
    sparsity: Annotated[float, Meta(ge=LEAST_SPARSITY, le=MOST_SPARSITY)] = 1.0
    gains: list[float] | None = None
    best: Best | None = None

    @property
    def awake(self) -> bool:
        """Whether the concept slots are awake; checkpoints that do not say so are of the stage that tells it."""
        return self.stage == "align" if self.woken is None else self.woken

    @property
    def writes_apart(self) -> bool:
        """Whether W_write of the concept slots holds what they write: it is measured with the gains, where the free
        slots are held."""
        return self.freeze == "free" and self.gains is not None

    @classmethod
    def fresh(cls, seed: int, form: DictionaryForm, freeze: str = "none") -> "RunState":
        """The state before step 0."""
        return cls(
            step=0,
            updates=0,
            stage="",
            seed=seed,
            stream={},
            rows_digest=0,
            dictionary=form,
            woken=False,
            freeze=freeze,
        )

    def to_json(self) -> dict[str, Any]:
        """Content of state.json."""
        return {"schema": SCHEMA, **asdict(self)}


def read_state(folder: Path) -> RunState:
    """state.json of a checkpoint folder. Raises DataError, one line, when it is foreign or malformed."""
    path, remedy = folder / "state.json", "resume from another checkpoint"
    values = read_json(path, dict[str, Any], remedy)
    if values.pop("schema", None) != SCHEMA:
        raise DataError(f"{path} has another schema than {SCHEMA}; use the version that wrote it")
    try:
        state = checked(values, RunState)
        state.dictionary.validate()
    except (ValueError, UserError) as error:
        raise DataError(f"{path}: {error}; {remedy}") from error
    if not (-(1 << 63) <= state.seed < 1 << 64 and 0 <= state.rows_digest < 1 << 64):
        raise DataError(f"{path}: seed or rows_digest is no number of 64 bits; {remedy}")
    if state.best is not None and not (state.best.step <= state.step and math.isfinite(state.best.value)):
        raise DataError(f"{path}: best is {state.best}, which cannot be at step {state.step}; {remedy}")
    if state.stage not in ("", *STAGES) or state.stream.get("step", state.step) != state.step:
        raise DataError(f"{path}: stage {state.stage!r:.40} or the position of the stream cannot be; {remedy}")
    return state


def least_bytes(state: RunState, listed: int) -> dict[str, int]:
    """Files that a checkpoint of a run in this state must have, each with a size that it cannot be below.

    listed: number of files that there are. Raises DataError when they are too few, before a list of impossible length
    is made.
    """
    form = state.dictionary
    if 2 * form.banks > listed:
        raise DataError(f"it lists {listed} files, too few for {form.banks} banks")
    files = {"state.json": 2, "manifest.json": 2}
    for unit in form.units():
        matrices = sum(4 * math.prod(shape) for shape in form.shapes(unit).values() if len(shape) == 2)
        files[f"dictionary/{unit}.safetensors"] = matrices
        held = state.freeze == "free" and bank_number(unit) is not None
        files[f"optimizer/{unit}.safetensors"] = 0 if held else matrices  # two moments, in bf16 or fp32
    return files
