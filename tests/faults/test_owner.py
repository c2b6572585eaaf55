"""A run folder has one owner: on one host, across hosts, when owners die, and when several come at once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Ranks, clean_environment
from tests.support.runs import arguments, metrics, outcome, train_here, train_rank
from trainer.errors import UserError
from trainer.ownership import Owner, Ownership

STARTS = int(os.environ.get("ALIGNSAE_DOUBLE_STARTS", "50"))  # of the slow tests
QUICK = {"interval": 0.05, "patience": 0.5}


def elsewhere(path: Path) -> None:
    """Rewrite an owner's file as of a host that cannot be looked at from here."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "node-7", "boot": "another"}))


def owned(folder: Path) -> Path:
    """A folder whose owner left without a word: its file, as of now."""
    ownership = Ownership(folder)
    ownership._take()
    return folder / ".owner" / "1"


def test_a_second_one_is_refused_until_the_first_has_left(tmp_path: Path) -> None:
    with Ownership(tmp_path / "run"):
        with (
            pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* since 2"),
            Ownership(tmp_path / "run"),
        ):
            pass
        with Ownership(tmp_path / "other"):
            pass
    with Ownership(tmp_path / "run"):
        pass


def test_an_owner_killed_on_this_host_keeps_nothing(tmp_path: Path) -> None:
    code = "import sys, os; from pathlib import Path; from trainer.ownership import Ownership\n"
    code += "Ownership(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=clean_environment())
    assert killed.returncode == -signal.SIGKILL and (tmp_path / ".owner" / "1").exists()
    began = time.monotonic()
    with Ownership(tmp_path):  # with the patience of 60 s: it must not be needed
        assert [p.name for p in (tmp_path / ".owner").iterdir()] == ["2"]
    assert time.monotonic() - began < 5


def test_a_pid_that_was_given_to_another_process_is_no_owner(tmp_path: Path) -> None:
    path = owned(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 1}))
    with Ownership(tmp_path):
        pass


def test_an_owner_elsewhere_lives_by_its_heartbeat(tmp_path: Path) -> None:
    with Ownership(tmp_path, interval=0.05):
        elsewhere(tmp_path / ".owner" / "1")
        began = time.monotonic()
        with pytest.raises(UserError, match="on node-7 since"), Ownership(tmp_path, interval=0.05, patience=30):
            pass
        assert time.monotonic() - began < 5  # one heartbeat is enough to know


def test_an_owner_elsewhere_without_heartbeat_is_gone(tmp_path: Path) -> None:
    elsewhere(owned(tmp_path))
    began = time.monotonic()
    with Ownership(tmp_path, **QUICK):
        assert time.monotonic() - began >= 0.5
    path = tmp_path / ".owner" / "2"
    elsewhere(path)
    os.utime(path, (time.time() - 100, time.time() - 100))
    began = time.monotonic()
    with Ownership(tmp_path, interval=10, patience=60):  # long gone: no need to wait
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host": 1}', "\0" * 100])
def test_a_damaged_owner_file_is_judged_by_its_time(tmp_path: Path, content: str) -> None:
    owned(tmp_path).write_text(content)
    with Ownership(tmp_path, **QUICK):
        pass


def contend(folder: Path, start: float, results: Any, over: Any) -> None:
    """Take the folder at a given moment, and keep it until all have tried."""
    time.sleep(max(0.0, start - time.time()))
    try:
        with Ownership(folder):
            results.put(1)
            over.wait(60)
    except UserError:
        results.put(0)


@pytest.mark.parametrize("rounds", [5, pytest.param(2 * STARTS, marks=pytest.mark.slow, id="many")])
@pytest.mark.parametrize("first", ["new", "dead"])
def test_of_several_at_once_one_wins(rounds: int, first: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(rounds):
        folder = tmp_path / str(number)
        if first == "dead":
            path = owned(folder)
            path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "1"}))
        results, over, start = context.Queue(), context.Event(), time.time() + 0.2
        contenders = [context.Process(target=contend, args=(folder, start, results, over)) for _ in range(6)]
        for process in contenders:
            process.start()
        won = sum(results.get(timeout=60) for _ in contenders)
        over.set()
        assert won == 1
        for process in contenders:
            process.join()


def test_one_that_was_taken_over_stops(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from trainer.ownership import Ownership\n"
    code += "Ownership(Path(sys.argv[1]), interval=0.1).__enter__(); print('has it', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=clean_environment(), text=True, stdout=-1, stderr=-1
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "has it\n"
    (tmp_path / ".owner" / "2").write_text(json.dumps(vars(Owner.me())))
    assert process.wait(timeout=20) == 2
    assert process.stderr.read().count("was removed or taken over") == 1


def train_when_told(argv: list[str], start: float) -> None:
    """Begin to train at a given moment."""
    time.sleep(max(0.0, start - time.time()))
    train_rank(argv)


@pytest.mark.parametrize("times", [2, pytest.param(STARTS, marks=pytest.mark.slow, id="many")])
def test_of_two_runs_started_together_one_trains(times: int, small_data: Path, tmp_path: Path) -> None:
    for number in range(times):
        folder, start = tmp_path / str(number), time.time() + 2
        argvs = [arguments(folder, small_data, f"optim.lr={rate}", "stages.0.epochs=20") for rate in ("3e-3", "1e-3")]
        with Ranks(1, train_when_told, argvs[0], start) as one, Ranks(1, train_when_told, argvs[1], start) as other:
            ended = [one.wait(), other.wait()]
        codes, said = [e.codes[0] for e in ended], [e.outputs[0] for e in ended]
        if codes == [0, 0]:  # the second came when the first had left: it found nothing to do
            assert any("resuming from" in text and "at step 220 of 220" in text for text in said)
        else:
            assert sorted(codes) == [0, 2], said
            refused = said[codes.index(2)].strip().splitlines()[-1]
            assert refused.startswith("trainer.train: error: run.dir=") and "in use by process" in refused
        assert sorted(metrics(folder)) == list(range(1, 221)) and outcome(folder)["status"] == "finished"


def test_a_run_that_fails_gives_its_folder_back(small_data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert train_here(tmp_path, small_data, "kernel=triton") == 2
    assert "triton" in capsys.readouterr().err
    assert train_here(tmp_path, small_data) == 0
