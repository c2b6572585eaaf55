"""What is imported is declared in pyproject.toml, what is declared is used, and requirements.lock pins all of it."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PRODUCT, TESTS = ("trainer", "tools"), ("tests",)

# Imported name -> why no dependency declares it.
NOT_DECLARED = {
    "triton": "a CUDA build of torch brings it; the kernels look for it before they import it",
    "sae_lens": "a peer that the benchmark times where somebody installed it",
    "sparsify": "a peer that the benchmark times where somebody installed it",
}
# What tests/peers imports, in an interpreter of its own.
PEERS = {"sae_lens", "sparsify"}
# Distribution -> why no module imports it.
NOT_IMPORTED = {
    "ninja": "the compiler driver of torch.utils.cpp_extension, a program",
    "pytest-xdist": "pytest finds it; an option of the Makefile",
    "ruff": "a command of the Makefile",
    "mypy": "a command of the Makefile",
    "clang-format": "a command of the Makefile",
    "pre-commit": "a command",
    "types-pyyaml": "mypy reads it",
    "types-tqdm": "mypy reads it",
}


def imported(text: str) -> set[str]:
    """Top-level packages that a module imports, inside functions too; without the standard library."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func)
            if name in ("pytest.importorskip", "importlib.import_module") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def imports_of(folders: tuple[str, ...]) -> set[str]:
    """Packages from elsewhere that the Python files of these folders import."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = {*PRODUCT, *TESTS, *(path.stem for path in files if path.parts[len(ROOT.parts)] in TESTS)}
    return set().union(*(imported(path.read_text()) for path in files)) - own


def declared() -> dict[str, list[Requirement]]:
    """Requirements by group: "" for what everybody installs, else the name of the extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {group: [Requirement(line) for line in lines] for group, lines in groups.items()}


def names(*groups: str) -> set[str]:
    """Canonical names of the distributions that these groups declare."""
    return {canonicalize_name(requirement.name) for group in groups for requirement in declared()[group]}


def undeclared(imports: set[str], distributions: set[str]) -> list[str]:
    """Imports that none of the distributions provides."""
    providers = packages_distributions()
    return sorted(
        name for name in imports if not distributions & {canonicalize_name(found) for found in providers.get(name, [])}
    )


def unused(distributions: set[str], imports: set[str]) -> list[str]:
    """Distributions of which no package is imported."""
    providers = packages_distributions()
    used = {canonicalize_name(found) for name in imports for found in providers.get(name, [])}
    return sorted(distributions - used)


def pins() -> Iterator[Requirement]:
    """The lines of requirements.lock."""
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            yield Requirement(line)


def test_what_the_product_imports_is_a_dependency():
    found = undeclared(imports_of(PRODUCT), names("", "remote"))  # `remote` as fsspec needs it, and says so
    assert found == sorted(NOT_DECLARED), "declare it in pyproject.toml with a reason, or take it off NOT_DECLARED"


def test_what_the_tests_import_is_declared():
    found = undeclared(imports_of(TESTS) - PEERS, names("", "dev", "remote"))
    assert not found, "add it to the extra dev"


def test_every_dependency_is_used():
    product = imports_of(PRODUCT)
    found = unused(names(""), product) + unused(names("dev", "remote") - names(""), product | imports_of(TESTS))
    assert sorted(found) == sorted(NOT_IMPORTED), "remove it from pyproject.toml, or from NOT_IMPORTED"


def test_the_lock_pins_every_dependency_within_its_bounds():
    pinned = {canonicalize_name(pin.name): pin for pin in pins()}
    for requirement in (line for lines in declared().values() for line in lines):
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"requirements.lock pins no {requirement.name}"
        (exact,) = pin.specifier
        assert exact.operator == "==" and requirement.specifier.contains(exact.version), f"{pin} is not {requirement}"


def test_packages_whose_undocumented_names_are_used_are_bounded():
    bounds = {requirement.name: {part.operator for part in requirement.specifier} for requirement in declared()[""]}
    assert {">=", "<"} <= bounds["torch"] & bounds["deepspeed"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import yaml.nodes", {"yaml"}),
        ("def f():\n    from jinja2.sandbox import Environment", {"jinja2"}),
        ("import os, numpy as np\nfrom pathlib import Path", {"numpy"}),
        ("pytest.importorskip('moto.server')", {"moto"}),
    ],
)
def test_imports_are_found(text, found):
    assert imported(text) == found


def test_both_directions_find_what_they_look_for():
    assert undeclared({"yaml", "numpy"}, {"numpy"}) == ["yaml"] and not undeclared({"yaml"}, {"pyyaml"})
    assert unused({"pyyaml", "ninja"}, {"yaml"}) == ["ninja"]
