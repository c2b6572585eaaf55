"""Every fault of table.yaml is survived; a sample of them in the fast suite."""

from pathlib import Path

import pytest

from tests.faults.fault_table import attempt_all, faults


def test_the_table_is_large_enough_and_names_no_fault_twice() -> None:
    listed = [(fault.kind, fault.name) for fault in faults()]
    assert len(listed) >= 250 and len(set(listed)) == len(listed)


@pytest.mark.parametrize("kinds", [["secrets"], pytest.param([], marks=pytest.mark.slow)], ids=["sample", "all"])
def test_every_fault_is_survived(kinds: list[str], tmp_path: Path) -> None:
    tried, failed = attempt_all(tmp_path, kinds)
    assert tried and not failed, "\n".join(failed)


def test_what_is_not_survived_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that takes what it should refuse is found out."""
    monkeypatch.setattr("tests.faults.fault_table.train.main", lambda argv: 0 if "seed=5" in argv[-1] else 2)
    monkeypatch.setattr("tests.faults.fault_table.Bench.__init__", prepare)
    _, failed = attempt_all(tmp_path, ["edited curricula"])
    assert any("exit code 0" in line for line in failed) and any("0 lines" in line for line in failed)


def prepare(bench, folder: Path) -> None:
    bench.folder, bench.base = folder, folder / "base"
    bench.base.mkdir()
