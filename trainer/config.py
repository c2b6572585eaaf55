"""The configuration of a run: composes what each room owns.

YAML < command line; unknown keys are errors; reading has no side effects.
"""

import difflib
import math
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.checkpoint import CheckpointConfig
from trainer.curriculum import StageConfig
from trainer.dictionary import DictionaryConfig
from trainer.errors import UserError
from trainer.guard import GuardConfig
from trainer.kernels.choice import NAMES as KERNELS
from trainer.losses import LossConfig
from trainer.optimizer import OptimConfig
from trainer.revival import RevivalConfig
from trainer.strategies import ParallelConfig
from trainer.stream import DataConfig
from trainer.tracking import TrackingConfig
from trainer.yaml_reader import MAX_BYTES, read_yaml

LONGEST_TEXT, LONGEST_NAME = 4096, 255  # characters of a value; bytes of a name in a path
PATHS = ("run.dir", "data.cache_dir", "dictionary.start_from", "checkpoint.resume", "parallel.deepspeed")
PATH_ENDINGS = (".shards", ".heldout", ".live.texts", ".live.prompts", ".live.manifest")
MOST = 1 << 50  # of whatever is counted


@dataclass
class RunConfig:
    """Where the run lives and how it is reported."""

    dir: str = "runs/default"  # folder of the run, shared by all nodes
    seed: int = 0  # of initial weights, order of rows and revival
    precision: str = "bf16"  # bf16: bf16 products on fp32 masters (fp32 ones on a CPU that would emulate them) | fp32
    log_every: int = 20  # steps
    # Steps between evaluations of the held-out rows (data.heldout), and one at the end; 0 = none.
    evaluate_every: int = 0
    # Minutes after which the run saves and leaves with the code that asks for a requeue; 0 = no limit.
    wall_minutes: float = 0.0

    def validate(self) -> None:
        """Raise UserError for a value that cannot be."""
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"run.precision={self.precision!r} is unknown; use fp32 or bf16")
        if not self.dir.strip():
            raise UserError("run.dir is empty; name the folder of the run")
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise UserError(f"run.seed={self.seed:.3g} must be a number of 64 bits")
        if not 0 <= self.wall_minutes < math.inf:
            raise UserError(f"run.wall_minutes={self.wall_minutes} must be a finite number, not negative")
        if not 1 <= self.log_every <= MOST:
            raise UserError(f"run.log_every={self.log_every} must be between 1 and {MOST}")
        if not 0 <= self.evaluate_every <= MOST:
            raise UserError(f"run.evaluate_every={self.evaluate_every} must be between 0 and {MOST}; 0 evaluates never")


@dataclass
class Config:
    """Everything that `trainer.train` reads."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    stages: list[StageConfig] = field(default_factory=list)
    optim: OptimConfig = field(default_factory=OptimConfig)
    revival: RevivalConfig = field(default_factory=RevivalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    kernel: str = "auto"  # auto | dense | sparse | triton


def load_config(path: str | Path, overrides: list[str]) -> Config:
    """Read a YAML file, apply `key=value` overrides, check every key and value.

    Raises UserError, one line: an unknown key (with the nearest known one), a value of the wrong type, an unreadable
    file. What needs the data or the launch is checked by trainer.assembly.
    """
    schema = OmegaConf.structured(Config)
    loaded = read_yaml(_read_text(path), f"configuration {path}")
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise UserError(f"configuration {path} must be a mapping of sections")
    _refuse_unknown(loaded, str(path))
    try:
        merged = OmegaConf.merge(schema, loaded)
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise UserError(f"override {override!r} is not key=value")
            _refuse_unknown(_nested(key), "the command line")
            value = read_yaml(text, f"override {key}")
            if key.startswith(("data.sources.", "data.live.")):  # update makes no new entry of a dict, or section
                merged = OmegaConf.merge(merged, _nested(key, value))
            else:
                OmegaConf.update(merged, key, value, merge=True)
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:  # some of its own errors are plain
        where = getattr(error, "full_key", None) or path
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"configuration {where}: {reason:.300}") from error
    _refuse_impossible(config)
    for section in vars(config).values():
        if hasattr(section, "validate"):
            section.validate()
    return config


def _read_text(path: str | Path) -> str:
    """Text of a file, and no more of it than a configuration may have."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_BYTES + 1).decode()
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read ({error.strerror}); check --config") from error
    except ValueError as error:  # not UTF-8; a name with a NUL
        raise UserError(f"configuration {path} cannot be read ({error}); check --config") from error


def _refuse_impossible(config: Config) -> None:
    """Raise UserError for what no key can be, whatever it means: numbers that are not finite or beyond 64 bits, texts
    that no file system, log or database takes. Rooms bound their own keys further (`validate`)."""
    for key, value in flatten(config).items():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, float) and not math.isfinite(part):
                raise UserError(f"{key}={part} must be a finite number")
            if isinstance(part, int) and not -(1 << 63) <= part < 1 << 64:
                raise UserError(f"{key}={float_or_inf(part):.3g} is beyond 64 bits")
            if isinstance(part, str):
                _check_text(key, part)
    if config.kernel not in KERNELS:
        raise UserError(f"kernel={config.kernel!r} is unknown; use one of {', '.join(KERNELS)}")


def float_or_inf(value: int) -> float:
    """As a float, for messages about numbers of any length."""
    return float(value) if abs(value) < 1 << 1000 else math.copysign(math.inf, value)


def _check_text(key: str, text: str) -> None:
    shown = repr(text if len(text) <= 40 else f"{text[:40]}...")
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{key}={shown} is longer than {LONGEST_TEXT} characters")
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in text):
        raise UserError(f"{key}={shown} has characters that no name can have")
    if (key in PATHS or key.endswith(PATH_ENDINGS)) and not text.lower().startswith("pipe:"):
        if any(len(name.encode()) > LONGEST_NAME for name in text.split("/")) and "://" not in text:
            raise UserError(f"{key}={shown} has a name longer than {LONGEST_NAME} bytes")
        try:
            urlsplit(text)
            Path(text).expanduser()
        except ValueError as error:
            raise UserError(f"{key}={shown} is neither a path nor a URL ({error})") from error
        except RuntimeError as error:
            raise UserError(f"{key}={shown} begins with the home folder of an unknown user") from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for tracking."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, inner in enumerate(value):
                visit(f"{prefix}.{index}", inner)
        else:
            flat[prefix] = value

    visit("", OmegaConf.to_container(OmegaConf.structured(config)))
    return flat


def _refuse_unknown(values: Any, where: str, schema: type = Config, prefix: str = "") -> None:
    """Raise UserError, with the nearest known key, for a key that is not in the dataclass; nested sections and lists of
    them too."""
    hints = get_type_hints(schema)
    for element in values if isinstance(values, list) else [values]:
        for name, inner in element.items() if isinstance(element, dict) else ():
            if name not in hints:
                raise UserError(_unknown(f"{prefix}{name}", where))
            named = get_origin(hints[name]) is dict  # any names, and below each the same keys
            for section in (hints[name], *get_args(hints[name])):
                if is_dataclass(section):
                    for value in inner.values() if named and isinstance(inner, dict) else [inner]:
                        _refuse_unknown(value, where, section, f"{prefix}{name}.")  # type: ignore[arg-type]


def _unknown(key: str, where: str) -> str:
    last = key.rpartition(".")[2]
    if key.startswith("stages.loss.") and last in get_type_hints(LossConfig):
        return f"{key!r} in {where} is one for the whole run, a stage has weights of its own alone; set loss.{last}"
    nearest = difflib.get_close_matches(key, sorted(_known_keys()), n=1, cutoff=0.0)
    return f"unknown configuration key {key!r} in {where}; the nearest known one is {nearest[0]!r}"


def _known_keys(schema: type = Config, prefix: str = "") -> set[str]:
    """Dotted names of all keys; an element of a list has the name of the list."""
    keys = set()
    for name, kind in get_type_hints(schema).items():
        keys.add(f"{prefix}{name}")
        for section in (kind, *get_args(kind)):
            if is_dataclass(section):
                keys |= _known_keys(section, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def _nested(key: str, value: Any = None) -> dict[str, Any]:
    """a.b.c -> {a: {b: {c: value}}}; list indices in between are dropped."""
    nested = value
    for part in reversed([part for part in key.replace("[", ".").replace("]", "").split(".") if not part.isdigit()]):
        nested = {part: nested}
    return nested
