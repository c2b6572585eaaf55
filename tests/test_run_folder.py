"""The names inside a run folder are spelled in trainer/run_folder.py and nowhere else."""

import ast
from pathlib import Path

import pytest

from trainer.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
HOME = ROOT / "trainer" / "run_folder.py"
PATHS = [name for name, value in vars(RunFolder).items() if isinstance(value, property) and name != "name"]
NAMES = {getattr(RunFolder(Path("run")), path).name for path in PATHS}


def spelled(text: str) -> set[str]:
    """Names that the code of a module spells as a whole string, or as the end of a path in one."""
    strings = (n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return NAMES & {string.rpartition("/")[2] for string in strings if " " not in string}


def test_a_checkpoint_is_in_its_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, found in (
        ("r", "r"),
        ("r/checkpoints/best", "r"),
        ("r/checkpoints/step-00000001", "r"),
        ("r/x/y", "r/x/y"),
    ):
        assert RunFolder.around(tmp_path / path).path == tmp_path / found
    (tmp_path / "r/checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "r/checkpoints")
    assert RunFolder.around(Path("best")).path == tmp_path / "r"


def test_all_names_are_known() -> None:
    assert {"config.yaml", "metrics.jsonl", "outcome.json", "evaluation.json", "checkpoints", "plots"} <= NAMES


@pytest.mark.parametrize(
    "path",
    [p for folder in ("trainer", "tools") for p in sorted((ROOT / folder).rglob("*.py")) if p != HOME],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_other_module_spells_a_name(path: Path) -> None:
    found = spelled(path.read_text())
    # The template of the page has the name of the page.
    found -= {"report.html"} if path == ROOT / "tools" / "report.py" else set()
    assert not found, f"{path.relative_to(ROOT)} spells {', '.join(sorted(found))}; use RunFolder"


def test_the_rule_finds_what_it_forbids() -> None:
    code = 'a = run / "metrics.jsonl"\nb = f"{run}/swap.json"\nc = "see evaluation.json"\n"""config.yaml of a run"""'
    assert spelled(code) == {"metrics.jsonl", "swap.json"}
