"""extract on several processes: the same bytes as one, also after a kill; units of work."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.language_model import save_model_of
from tests.support.ranks import Ranks, run_ranks
from tools.cli import main
from tools.extract import deal
from tools.extracting.units import UnitWriter

SENTENCE = "Ada works in Oslo, Ben was born in Lima, Cem studied law. "


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of an extraction of about ten units of two splits at two hook points."""
    folder = tmp_path_factory.mktemp("units")
    save_model_of([SENTENCE], folder / "lm")
    texts = [SENTENCE * (1 + i * 7 % 5) for i in range(60)]
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--context", "32", "--heldout", "5", "--unit-kb", "1", "--rows-per-block", "50", "--device", "cpu"]
    source = ["--model", str(folder / "lm"), "--texts", str(folder / "t.jsonl"), "--layers", "0,1"]
    return ["extract", *source, "--batch-size", "3", *arguments]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def dying(arguments: list[str]) -> int:
    """The command, in which rank 1 is killed in its third unit."""
    write, count = UnitWriter.write, 0

    def counted(self: Any, *rest: Any) -> None:
        nonlocal count
        count += 1
        if count == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *rest)

    UnitWriter.write = counted  # type: ignore[method-assign, assignment]
    return main(arguments)


def test_two_processes_write_the_bytes_of_one(command: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    output = capsys.readouterr().out
    assert "tokens/s" in output and "of the time in the model" in output
    alone = contents(tmp_path / "one")
    assert len(alone) > 10 and not any(".units" in name for name in alone)
    outputs = run_ranks(2, main, [*command, "--out", str(tmp_path / "two")])
    assert "2 processes" in outputs[0] and "rows of width" not in outputs[1]
    assert contents(tmp_path / "two") == alone
    assert main(["verify", str(tmp_path / "two/layer-01/train")]) == 0


@pytest.mark.slow
def test_other_processes_go_on_where_some_were_killed(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    with Ranks(2, dying, [*command, "--out", str(tmp_path / "two")]) as ranks:
        assert any(ranks.wait().codes)
    left = contents(tmp_path / "two")
    assert left and all(".units" in name for name in left)  # finished units wait for the others
    times = {path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*.tar")}
    run_ranks(4, main, [*command, "--out", str(tmp_path / "two")])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert times <= {path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*.tar")}


@pytest.mark.slow
def test_what_is_wrong_is_said_once(command: list[str], tmp_path: Path) -> None:
    with Ranks(2, main, [*command, "--out", str(tmp_path / "out"), "--layers", "7"]) as ranks:
        ended = ranks.wait()
    assert ended.codes == [2, 2]
    said = [output.count("alignsae: error: layer 7 does not exist") for output in ended.outputs]
    assert said == [1, 0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupted_join_is_finished(command: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    assert main([*command, "--out", str(out)]) == 0
    whole = contents(out)
    for folder in out.glob("*/*"):
        for path in folder.iterdir():
            path.unlink()
    replace, count = Path.replace, 0

    def stopping(self: Path, target: Path) -> Path:
        nonlocal count
        count += "/.units-" in str(self) and "/.units-" not in str(target)
        if count == 4:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopping)
    assert main([*command, "--out", str(out)]) == 130
    monkeypatch.undo()
    assert contents(out) != whole
    assert main([*command, "--out", str(out)]) == 0
    assert contents(out) == whole


def test_units_are_dealt_evenly() -> None:
    sizes = [7, 1, 1, 1, 1, 1, 1, 1]
    assert [sum(sizes[unit] for unit in units) for units in deal(list(range(8)), sizes, 2)] == [7, 7]
    dealt = deal([1, 5, 6, 7], sizes, 3)
    assert sorted(unit for units in dealt for unit in units) == [1, 5, 6, 7] and all(dealt)
