"""The folder that `alignsae import` writes and that `dictionary.start_from` and `load` read.

    dictionary.json            form, where it comes from, size and hash of every other file; written last
    output.safetensors         b_dec [D]; W_write [m, D] where the source says so (Source.written)
    bank-00000.safetensors     W_enc [n, D], b_enc [n], W_dec [n, D]; threshold [n] unless the gate is relu

Weights are fp32, act on raw activations and give raw reconstructions: they belong to no data set's normalisation.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.checkpoint.files import digest, seal, sync_folder
from trainer.dictionary import (
    BankWeights,
    ConceptDictionary,
    DictionaryConfig,
    DictionaryForm,
    OutputBias,
    SlotBank,
    bank_number,
    bank_unit,
    joined,
    normalisation,
)
from trainer.dictionary.units import OUTPUT
from trainer.errors import DataError, UserError
from trainer.files import allow_as_umask, checked, read_json, write_json
from trainer.pretrained.source import Facts, Source, rescale

SCHEMA = 1
FILE_NAME = "dictionary.json"


@dataclass
class Description:
    """Content of dictionary.json.

    gate: see ChosenForm; k: mean active slots of a row, as the source states it or as measured; None: unknown.
    decoder_norm: mean norm of the decoder rows. facts: where it comes from. measured: figures of the rows that the
    import was given. files: name -> bytes and hash.
    """

    width: int
    slots: int
    bank_slots: int
    gate: str
    k: float | None
    decoder_norm: float
    facts: Facts
    measured: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def form(self) -> DictionaryForm:
        """The form of a dictionary that holds these slots as its free ones. Raises UserError for one that cannot be."""
        chosen = DictionaryConfig(free_slots=self.slots, bank_slots=self.bank_slots, gate=self.gate)
        if self.k is not None:
            chosen.k = max(1, round(self.k))
        form = chosen.form(self.width)
        form.validate()
        return form


def refuse_existing(out: Path) -> None:
    """Raise UserError for a folder that is there: nothing is overwritten."""
    if out.exists():
        raise UserError(f"{out} already exists; name a folder that does not")


@contextmanager
def new_folder(out: Path) -> Iterator[tuple[Path, Path]]:
    """A folder to write into, and one for what is fetched and unpacked meanwhile. The first gets the name `out` when
    all went well, else nothing stays. Raises UserError when the disk refuses, or `out` is there."""
    refuse_existing(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "scratch").mkdir(parents=True)
        yield partial, partial / "scratch"
        shutil.rmtree(partial / "scratch")
        allow_as_umask(partial)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}; free some space or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(
    source: Source, folder: Path, *, theta: float | None, k: float | None, measured: dict[str, Any]
) -> Description:
    """Write a source into `folder`, which exists, bank by bank.

    theta: threshold of all slots, of a source that has none of its own. k: see Description. measured: see Description.
    Raises DataError for weights that are no numbers, OSError when the disk refuses.
    """
    bank_slots = min(source.slots, DictionaryConfig().bank_slots)
    norms, low, high, names = 0.0, float("inf"), 0.0, ["output.safetensors"]
    output = {"b_dec": source.output_bias()}
    if source.written is not None:
        output["W_write"] = source.written
    save_file(output, folder / names[0])
    for number, begin in enumerate(range(0, source.slots, bank_slots)):
        weights = source.bank(begin, min(begin + bank_slots, source.slots))
        if theta is not None:
            weights = weights._replace(threshold=torch.full_like(weights.b_enc, theta))
        tensors = {
            name: tensor.contiguous() for name, tensor in weights._asdict().items() if isinstance(tensor, Tensor)
        }
        names.append(f"{bank_unit(number)}.safetensors")
        save_file(tensors, folder / names[-1])
        norms += float(weights.W_dec.norm(dim=1).double().sum())
        threshold = torch.zeros(1) if weights.threshold is None else weights.threshold
        low, high = min(low, float(threshold.min())), max(high, float(threshold.max()))
    description = Description(
        source.width,
        source.slots,
        bank_slots,
        _gate(low, high, k),
        k,
        norms / source.slots,
        source.facts,
        measured,
        {name: seal(folder / name) for name in names},
    )
    write_json(folder / FILE_NAME, {"schema": SCHEMA, **asdict(description)})
    sync_folder(folder)
    return description


def _gate(low: float, high: float, k: float | None) -> str:
    """The gate that thresholds between `low` and `high` are of."""
    if high == 0.0:
        return "relu"
    return "batch_topk" if low == high and k is not None else "jumprelu"


@dataclass(frozen=True)
class Place:
    """Where imported slots go.

    bank_slots: of the dictionary they go into. mean [D], scale: its normalisation, x = (h - mean) / scale. gain: how
    many times as large codes are to be.
    """

    bank_slots: int
    mean: Tensor
    scale: Tensor
    gain: float = 1.0


class Imported:
    """An imported dictionary, opened: its description checked, its files there. A file's content is checked when it is
    first read.

    Raises UserError when `path` is no such folder, DataError when it is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not (self.path / FILE_NAME).is_file():
            raise UserError(
                f"{self.path}: holds no {FILE_NAME}; write such a folder with `alignsae import SOURCE --out FOLDER`"
            )
        values = read_json(self.path / FILE_NAME, dict[str, Any], "import it again")
        if values.pop("schema", None) != SCHEMA:
            raise DataError(f"{self.path / FILE_NAME} has another schema than {SCHEMA}; import it again")
        try:
            self.description = checked(values, Description)
            self.form = self.description.form
        except (ValueError, UserError, OverflowError) as error:
            raise DataError(f"{self.path / FILE_NAME}: {error}; import it again") from error
        if len(self.description.files) != self.form.banks + 1:
            raise DataError(f"{self.path / FILE_NAME} lists {len(self.description.files)} files; import it again")
        for unit in [OUTPUT, *(bank_unit(number) for number in range(self.form.banks))]:
            path = self.path / f"{unit}.safetensors"
            size = path.stat().st_size if path.is_file() else None
            if self.description.files.get(path.name, {}).get("bytes") != size:
                raise DataError(f"{path} is not there as {FILE_NAME} describes it; import it again")
        self._checked: set[str] = set()

    def fill(self, name: str, unit: nn.Module, place: "Place") -> None:
        """Set the weights of a unit (ConceptDictionary.units) before an engine has it.

        Units that the source does not have (concept slots, value head) are left alone. A free bank takes the slots of
        its place, whatever the banks of the folder are.
        """
        number = bank_number(name)
        if isinstance(unit, OutputBias):
            with self._file(OUTPUT) as file, torch.no_grad():
                unit.b_dec.copy_(normalisation.unfold_output(file.get_tensor("b_dec"), place.mean, place.scale))
        elif isinstance(unit, SlotBank) and number is not None:
            begin = number * place.bank_slots
            weights = normalisation.unfold(self.bank(begin, begin + unit.slots), place.mean, place.scale)
            unit.begin_at(rescale(weights, place.gain))

    def written(self) -> Tensor | None:
        """See Source.written."""
        with self._file(OUTPUT) as file:
            found = file.get_tensor("W_write") if "W_write" in file.keys() else None  # noqa: SIM118
        if found is not None and (found.ndim != 2 or found.shape[1] != self.form.width):
            raise DataError(f"{self.path}: W_write has shape {tuple(found.shape)}; import it again")
        return found

    def bank(self, begin: int, end: int) -> BankWeights:
        """The slots [begin, end), raw."""
        parts, size = [], self.form.bank_slots
        for number in range(begin // size, -(-end // size)):
            low, high = max(begin - number * size, 0), min(end - number * size, size)
            with self._file(bank_unit(number)) as file:
                W_enc, b_enc, W_dec = (file.get_slice(name)[low:high] for name in ("W_enc", "b_enc", "W_dec"))
                threshold = None if self.form.gate == "relu" else file.get_slice("threshold")[low:high]
            parts.append(BankWeights(W_enc, b_enc, W_dec, threshold))
        return joined(parts)

    def _file(self, unit: str) -> Any:
        path = self.path / f"{unit}.safetensors"
        try:
            if unit not in self._checked and digest(path) != self.description.files[path.name].get("xxh3_128"):
                raise DataError(f"{path} differs from its hash; import it again")
            self._checked.add(unit)
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); import it again") from error


def load(path: str | Path) -> ConceptDictionary:
    """The dictionary of a folder that `alignsae import` wrote: all its slots are free ones, raw activations in and
    out."""
    imported = Imported(path)
    place = Place(imported.form.bank_slots, torch.zeros(imported.form.width), torch.ones(()))
    dictionary = ConceptDictionary(imported.form, on_unit=lambda name, unit: imported.fill(name, unit, place))
    dictionary.written = imported.written()
    return dictionary.eval().requires_grad_(False)
