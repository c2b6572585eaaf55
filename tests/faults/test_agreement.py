"""Ranks that were started with different settings, code or data are refused together, whatever differs."""

import os
from pathlib import Path

import pytest

from tests.support.ranks import Ended, Ranks
from tests.support.runs import arguments, edit_json, train_rank
from trainer import agreement
from trainer.agreement import difference, source_digest


def train_as_told(argv: list[str], own: str, code: str) -> None:
    """A rank that trains; rank 1 with a setting of its own, or with other sources."""
    if os.environ["RANK"] == "1":
        argv = [*argv, own] if own else argv
        if code:
            agreement.source_digest = lambda folder=None: code
    train_rank(argv)


def start(folder: Path, data: Path, own: str, code: str = "") -> Ended:
    """Two ranks."""
    argv = arguments(folder, data, "parallel.timeout=60", "stages.0.epochs=1", "stages.1.epochs=1")
    with Ranks(2, train_as_told, argv, own, code) as ranks:
        return ranks.wait(120)


def said(ended: Ended) -> list[str]:
    """The lines that a user reads."""
    lines = [line for output in ended.outputs for line in output.splitlines()]
    assert not any("Traceback" in line for line in lines), ended.report()
    return [line for line in lines if line.startswith("trainer.train:")]


@pytest.mark.parametrize(
    "setting",
    [
        "data.global_batch=24",
        "optim.lr=0.1",
        *(
            pytest.param(setting, marks=pytest.mark.slow)
            for setting in (
                "run.seed=5", "loss.sp=0.3", "dictionary.bank_slots=8", "kernel=auto", "stages.0.epochs=3.0",
                "checkpoint.every=3", "parallel.strategy=dictionary", "run.dir=elsewhere", "checkpoint.resume=none",
                "data.window=3", "stages.1.loss.sp=0.2", "parallel.timeout=50.0", "run.log_every=2", "guard.spike=5.0",
            )
        ),
    ],
)  # fmt: skip
def test_a_setting_of_one_rank_is_named(setting: str, small_data: Path, tmp_path: Path) -> None:
    ended = start(tmp_path, small_data, setting)
    assert ended.codes == [2, 2]
    (line,) = said(ended)
    key, value = setting.split("=")
    assert f"{key}: " in line and f"{value} on rank 1" in line and "on rank 0" in line
    assert not (tmp_path / "run").exists()


def test_where_a_rank_keeps_its_cache_is_its_own_affair(small_data: Path, tmp_path: Path) -> None:
    ended = start(tmp_path, small_data, f"data.cache_dir={tmp_path}")
    assert ended.codes == [0, 0], ended.report()


def test_other_data_and_other_code_are_named(small_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in small_data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    edit_json(copy / "manifest.json", model="another")
    (line,) = said(start(tmp_path / "a", small_data, f"data.shards={copy}"))
    assert "digest of the manifest" in line or "data.shards" in line
    (line,) = said(start(tmp_path / "b", small_data, "", code="0" * 16))
    assert "digest of its sources" in line and "0000000000000000 on rank 1" in line


def test_differences_in_words() -> None:
    ranks = [{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}, {"a": "1", "b": "2"}]
    assert difference(ranks).startswith("ranks disagree on b: 2 on ranks 0-1, 4, 3 on rank 2, nothing on rank 3; start")
    assert difference([{"a": "1"}] * 4) == ""
    many = difference([{f"k{i}": "1" for i in range(9)}, {f"k{i}": "2" for i in range(9)}])
    assert "(and 6 more)" in many
    secret = difference([{"uri": "'http://user:PASS@host/a'"}, {"uri": "'http://user:PASS@host/b'"}])
    assert "PASS" not in secret and "host/b on rank 1" in secret


def test_sources_have_a_digest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    one = source_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("no source")
    assert source_digest(tmp_path) == one
    (tmp_path / "a.py").write_text("x = 2\n")
    two = source_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({one, two, source_digest(tmp_path)}) == 3
