"""Ranks that were started with different settings, code or data are refused together, whatever differs."""

from pathlib import Path

import pytest

from tests.faults.programs import launch
from tests.support.runs import edit_json
from trainer.agreement import difference, source_digest

# Settings `RANK:key=value` are those of one rank.
PROGRAM = """
import os, sys
from trainer import agreement, train
if os.environ["RANK"] == os.environ.get("OTHER_CODE_ON"):
    agreement.source_digest = lambda folder=None: "0" * 16
own = [a[2:] for a in sys.argv[1:] if a[1] == ":" and a[0] == os.environ["RANK"]]
train.exit_with(train.main([*(a for a in sys.argv[1:] if a[1] != ":"), *own]))
"""


def start(folder: Path, data: Path, *settings: str):
    """Two ranks, with settings of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return launch(folder, data, "parallel.timeout=60", *settings, world=2, program=program)


def said(ended) -> list[str]:
    """The lines that a user reads, without the launcher's."""
    return [line for line in ended.stderr.splitlines() if line.startswith("trainer.train:")]


@pytest.mark.parametrize(
    "setting",
    [
        "data.global_batch=24",
        *(
            pytest.param(setting, marks=pytest.mark.slow)
            for setting in (
                "run.seed=5", "loss.sp=0.3", "optim.lr=0.1", "dictionary.bank_slots=8", "kernel=auto",
                "stages.0.epochs=1",
                "checkpoint.every=3", "parallel.strategy=dictionary", "run.dir=elsewhere", "checkpoint.resume=none",
                "data.window=3", "stages.1.loss.sp=0.2", "parallel.timeout=50", "run.log_every=2", "guard.spike=5",
            )
        ),
    ],
)  # fmt: skip
def test_a_setting_of_one_rank_is_named(setting: str, small_data: Path, tmp_path: Path) -> None:
    ended = start(tmp_path, small_data, f"1:{setting}")
    assert ended.returncode != 0
    (line,) = said(ended)
    key, value = setting.split("=")
    assert f"{key}: " in line and f"{value} on rank 1" in line and "on rank 0" in line
    assert not (tmp_path / "run").exists()


def test_where_a_rank_keeps_its_cache_is_its_own_affair(small_data: Path, tmp_path: Path) -> None:
    ended = start(tmp_path, small_data, f"1:data.cache_dir={tmp_path}", "stages.1.epochs=1", "stages.0.epochs=1")
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.slow
def test_other_data_and_other_code_are_named(small_data: Path, tmp_path: Path, monkeypatch) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in small_data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    edit_json(copy / "manifest.json", model="another")
    (line,) = said(start(tmp_path / "a", small_data, f"1:data.shards={copy}"))
    assert "digest of the manifest" in line or "data.shards" in line
    monkeypatch.setenv("OTHER_CODE_ON", "0")
    (line,) = said(start(tmp_path / "b", small_data))
    assert "digest of its sources" in line and "0000000000000000 on rank 0" in line


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
