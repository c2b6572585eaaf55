"""Imports go downward only, engines and trackers have one home, files stay short (docs/design.md, "Rooms")."""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Bottom to top. A room may import rooms of lower floors, and itself; rooms of one floor do not know each other.
FLOORS = [
    ["errors"],
    ["private", "redact", "files", "yaml_reader", "labels"],
    ["allocator", "topology", "stream", "dictionary", "journal", "run_folder", "late", "language_model"],
    ["losses", "scores", "following", "autograd", "guard", "interrupt", "agreement", "ownership", "failures"],
    ["kernels", "binding", "extraction"],
    ["sums", "heads"],
    ["objective", "optimizer"],
    ["curriculum", "metrics", "waking"],
    ["gains", "strategies", "tracking"],
    ["beginning"],
    ["checkpoint", "revival"],
    ["pretrained", "heldout"],
    ["analysis", "config"],
    ["stepping"],
    ["loop", "inputs"],
    ["assembly"],
    ["train"],
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Package or room -> rooms that may import it.
HOMES = {
    "accelerate": {"strategies"},
    "deepspeed": {"strategies"},
    "mlflow": {"tracking"},
    "triton": {"kernels"},
    "transformers": {"language_model", "tools"},
    "trainer.config": {"loop", "stepping", "inputs", "assembly", "train", "tools"},  # rooms own their configuration
}
LONG, TOO_LONG = 300, 320  # lines


def modules(folder: str) -> list[Path]:
    """All Python files below a top-level folder."""
    return sorted((ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> tuple[str, ...]:
    """('trainer', 'stream', 'plan') for trainer/stream/plan.py; a package is named by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Every imported module of a file, as parts; `from a import b` counts as a.b, function-level imports too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out"
            base = tuple((node.module or "").split("."))
            for alias in node.names:
                yield (*base, alias.name)


def room_of(parts: tuple[str, ...]) -> str | None:
    """The room under trainer/ that a dotted name belongs to."""
    return parts[1] if len(parts) > 1 and parts[0] == "trainer" else None


def test_every_room_has_a_floor():
    rooms = {name_of(path)[1] for path in modules("trainer") if len(name_of(path)) > 1}
    assert rooms <= set(FLOOR), f"give a floor to {sorted(rooms - set(FLOOR))}"


@pytest.mark.parametrize("path", modules("trainer"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path):
    here = room_of(name_of(path))
    for parts in imports(path):
        assert parts[0] != "tools", f"{path}: the library must not know the tools"
        room = room_of(parts)
        if here is None or room is None or room == here:
            continue
        assert room in FLOOR, f"{path}: trainer.{room} does not exist"
        assert FLOOR[room] < FLOOR[here], f"{path}: {here} must not import {room}, which is not below it"


@pytest.mark.parametrize("path", modules("trainer") + modules("tools"), ids=lambda p: str(p.relative_to(ROOT)))
def test_engines_and_trackers_have_one_home(path):
    name = name_of(path)
    here = "tools" if name[0] == "tools" else room_of(name)
    for parts in imports(path):
        package = ".".join(parts[:2]) if parts[0] == "trainer" else parts[0]
        homes: set[str | None] = {*HOMES[package]} if package in HOMES else {here}
        assert here in homes, f"{path}: only {', '.join(sorted(map(str, homes)))} may import {package}"


@pytest.mark.parametrize("path", modules("tools"), ids=lambda p: str(p.relative_to(ROOT)))
def test_tools_know_no_loop_and_not_each_other(path):
    name = name_of(path)
    for parts in imports(path):
        assert parts[:2] != ("trainer", "loop"), f"{path}: tools must not import the loop"
        if parts[0] != "tools" or name == ("tools", "cli"):
            continue
        other = ROOT.joinpath("tools", parts[1])
        is_helper = parts[1] == "plots" or other.is_dir()
        assert is_helper or parts[1] == name[1], f"{path}: must not import the tool {parts[1]}"


@pytest.mark.parametrize("path", modules("trainer") + modules("tools"), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= TOO_LONG, f"{path.relative_to(ROOT)} has {lines} lines; split it"
    if lines > LONG:
        warnings.warn(f"{path.relative_to(ROOT)} has {lines} lines, more than {LONG}", stacklevel=1)


def test_the_rules_find_what_they_forbid(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    for text, rule in (
        ("from trainer.loop import train", test_imports_go_downward),
        ("from trainer import loop", test_imports_go_downward),
        ("def f():\n    import trainer.loop", test_imports_go_downward),
        ("import tools.cli", test_imports_go_downward),
        ("from accelerate import Accelerator", test_engines_and_trackers_have_one_home),
        ("import mlflow.tracking", test_engines_and_trackers_have_one_home),
        ("from trainer import config", test_engines_and_trackers_have_one_home),
        ("x = 1\n" * 400, test_files_stay_short),
    ):
        path = tmp_path / "trainer" / "losses.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        with pytest.raises(AssertionError):
            rule(path)
    (tmp_path / "tools").mkdir()
    tool = tmp_path / "tools" / "swap.py"
    for text in ("from tools import evaluate", "from trainer.loop import train"):
        tool.write_text(text)
        with pytest.raises(AssertionError):
            test_tools_know_no_loop_and_not_each_other(tool)
