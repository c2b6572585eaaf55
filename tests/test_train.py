"""Training through its entry point: reproducible, resumable at any step, and one line for what it refuses."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.support.data import CONCEPTS, ROWS, WIDTH, write_data
from tests.support.runs import (
    BATCH,
    LANES,
    STEPS_PER_EPOCH,
    SWITCH,
    TOTAL,
    arguments,
    assert_same,
    digests,
    edit_json,
    metrics,
    outcome,
    tensors,
    train_here,
)
from trainer import load, loop, train
from trainer.checkpoint import load_dictionary, saver
from trainer.stream import Manifest, Plan, RowDigest, ShardSpec, ShardWriter


class Killed(BaseException):
    """Stands for a kill: nothing in the trainer catches it."""


@pytest.fixture(scope="module")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train_here(folder, small_data) == 0
    return folder


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action) -> None:
    """Run `action` right before the update of that step, once."""
    original = loop.to_micro_batch

    def to_micro_batch(run, rows):
        if run.state.step == step:
            monkeypatch.setattr(loop, "to_micro_batch", original)
            action()
        return original(run, rows)

    monkeypatch.setattr(loop, "to_micro_batch", to_micro_batch)


def die() -> None:
    raise Killed


def test_run_folder(undisturbed: Path, small_data: Path) -> None:
    lines = metrics(undisturbed)
    assert list(lines) == list(range(1, TOTAL + 1))
    assert {lines[SWITCH]["stage"], lines[SWITCH + 1]["stage"]} == {"pretrain", "align"}
    assert lines[TOTAL]["fvu"] < 0.5 * lines[1]["fvu"]
    ended = outcome(undisturbed)
    assert ended["status"] == "finished" and ended["exit_code"] == 0 and ended["step"] == ended["steps"] == TOTAL
    assert ended["checkpoint"] == f"step-{TOTAL:08d}"
    dictionary, manifest = load_dictionary(undisturbed / "run")
    assert dictionary.concept_names == CONCEPTS
    assert manifest.digest == Manifest.load(small_data).digest


def test_what_does_not_count_in_a_stage_is_absent(undisturbed: Path) -> None:
    for step, line in metrics(undisturbed).items():
        found = {name for name in line if name.startswith("loss/")} | ({"binding"} & line.keys())
        of_align = {"loss/bind", "loss/perp", "loss/val", "loss/sp_concept", "binding"}
        assert found == {"loss/rec", "loss/sp"} | (of_align if step > SWITCH else set()), step


def test_digest_is_that_of_the_plan(undisturbed: Path, small_data: Path) -> None:
    plan = Plan(Manifest.load(small_data), 0, BATCH, LANES, 2)
    chain = RowDigest()
    for step, digest in digests(undisturbed).items():
        rows = plan.batch_rows(*plan.locate(step - 1))
        chain.update(rows, range(len(rows)))
        assert chain.hex() == digest


def test_same_seed_same_run(undisturbed: Path, small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path / "same", small_data, "checkpoint.asynchronous=false", "checkpoint.every=0") == 0
    assert_same(tensors(undisturbed), tensors(tmp_path / "same"))
    assert train_here(tmp_path / "other", small_data, "run.seed=1") == 0
    assert not torch.equal(
        tensors(undisturbed)["dictionary/bank-00000/W_enc"], tensors(tmp_path / "other")["dictionary/bank-00000/W_enc"]
    )


@pytest.mark.parametrize("step", [0, 3, 7, STEPS_PER_EPOCH, 15, SWITCH, SWITCH + 1, TOTAL - 1])
def test_resume_equals_undisturbed(
    step: int, undisturbed: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, step, die)
    with pytest.raises(Killed):
        train_here(tmp_path, small_data)
    assert outcome(tmp_path)["status"] == "failed"
    assert train_here(tmp_path, small_data) == 0
    assert_same(tensors(undisturbed), tensors(tmp_path))
    assert digests(undisturbed) == digests(tmp_path)


@pytest.mark.parametrize(
    "where", ["seal", "write_json", "sync_folder", "_retain", "rename", "touch", "write_atomically"]
)
def test_killed_while_saving(
    where: str, undisturbed: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def armed() -> None:
        owner = saver if hasattr(saver, where) else saver.Saver if hasattr(saver.Saver, where) else Path

        def dies(*_: object, **__: object) -> None:
            raise Killed

        monkeypatch.setattr(owner, where, dies)

    with monkeypatch.context() as patch:
        at_step(patch, 13, armed)  # the save after this step is the second one
        with pytest.raises(Killed):
            train_here(tmp_path, small_data, "checkpoint.asynchronous=false")
        monkeypatch.undo()
    assert train_here(tmp_path, small_data) == 0
    assert_same(tensors(undisturbed), tensors(tmp_path))
    assert digests(undisturbed) == digests(tmp_path)
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"latest", f"step-{TOTAL - TOTAL % 7:08d}", f"step-{TOTAL:08d}"}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda value: str(value)
)
def test_signal_saves_and_leaves(
    number: int, code: int, undisturbed: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    at_step(monkeypatch, 9, lambda: os.kill(os.getpid(), number))
    assert train_here(tmp_path, small_data) == code
    assert signal.getsignal(number) is before
    ended = outcome(tmp_path)
    assert (ended["status"], ended["exit_code"], ended["step"]) == ("interrupted", code, 10)
    assert ended["checkpoint"] == "step-00000010"
    assert train_here(tmp_path, small_data) == 0
    assert_same(tensors(undisturbed), tensors(tmp_path))


def test_signal_while_concepts_wake_up(
    undisturbed: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.class_means

    def class_means(batches, *rest):
        next(batches)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(batches, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "class_means", class_means)
        assert train_here(tmp_path, small_data) == 75
    assert outcome(tmp_path)["checkpoint"] == f"step-{SWITCH:08d}"
    assert train_here(tmp_path, small_data) == 0
    assert_same(tensors(undisturbed), tensors(tmp_path))


def test_a_concept_whose_row_an_epoch_leaves_out_wakes_up_and_is_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An epoch leaves out the 16 rows that do not fill a batch."""
    data, rare = tmp_path / "data", 100
    concept = torch.arange(ROWS) % 2
    concept[rare] = 2
    acts = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    acts[torch.arange(ROWS), concept] += 5
    spec = ShardSpec(width=WIDTH, dtype="float32", concepts=CONCEPTS, answers=[], model="none", hook_point="layer-01")
    with ShardWriter(data, "train", spec, rows_per_block=20) as writer:
        writer.write(acts, concept, torch.full((ROWS,), -1))

    def met(seed: int, first: int, epochs: int) -> bool:
        plan = Plan(Manifest.load(data), seed, BATCH, LANES, 2)
        return any(rare in plan.step_rows(step) for step in range(first, first + epochs * STEPS_PER_EPOCH))

    seed = next(s for s in range(5000) if not (met(s, SWITCH, 1) or met(s, TOTAL, 1)))
    assert met(seed, SWITCH, 3) and met(seed, TOTAL, 3)
    assert train_here(tmp_path, data, f"run.seed={seed}") == 0
    assert "stay asleep" not in caplog.text
    assert {*load(tmp_path / "run").gains} == {*CONCEPTS}


def test_wall_clock_budget(undisturbed: Path, small_data: Path, tmp_path: Path) -> None:
    assert train_here(tmp_path, small_data, "run.wall_minutes=0.00001") == 75
    assert outcome(tmp_path)["checkpoint"] == "step-00000001"
    assert train_here(tmp_path, small_data) == 0
    assert_same(tensors(undisturbed), tensors(tmp_path))


def poisoned(folder: Path, factor: float) -> Path:
    """Data whose row 100 is multiplied by `factor`."""
    return write_data(folder, dtype="float32", factors={100: factor})


@pytest.mark.parametrize(
    ("factor", "settings", "reason"),
    [(1e25, [], "the loss is inf"), (1e3, ["guard.spike=20", "guard.window=3"], "over guard.spike=20")],
)
def test_bad_numbers_change_nothing(
    factor: float, settings: list[str], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = poisoned(tmp_path / "data", factor)
    every_step = ["checkpoint.every=1", "checkpoint.keep=100", "revival.method=none"]
    assert train_here(tmp_path, data, *every_step, *settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    plan = Plan(Manifest.load(data), 0, BATCH, LANES, 2)
    hit = [s + 1 for s in range(TOTAL) if 100 in plan.batch_rows(*plan.locate(s))]
    assert hit
    if "guard.spike=20" in settings:
        hit = [step for step in hit if (step - 1) % SWITCH >= 3]  # no median yet
    assert [line["step"] for line in lines] == hit
    assert outcome(tmp_path)["skipped_updates"] == len(hit)
    for line in lines:
        step = line["step"]
        assert line["row_ids"] == plan.batch_rows(*plan.locate(step - 1)).tolist()
        assert reason in line["problem"]
        if step - 1 in (0, SWITCH):
            continue  # nothing was saved before, or the concept slots woke up in between
        before, after = tensors(tmp_path, f"step-{step - 1:08d}"), tensors(tmp_path, f"step-{step:08d}")
        for table in (before, after):
            for name in [name for name in table if name.endswith("last_fired")]:
                del table[name]
        assert_same(before, after)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(tmp_path).values())
    assert reason in caplog.text


def test_stops_after_too_many_bad_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data", dtype="float32", factors=dict.fromkeys(range(0, 496, 5), 1e25))
    assert train_here(tmp_path, data, "guard.stop_after=4") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "4 updates in a row were skipped" in error and "skipped.jsonl" in error
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 4
    assert outcome(tmp_path)["exit_code"] == 2


def test_skips_survive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = poisoned(tmp_path / "data", 1e3)
    settings = ["guard.spike=20", "guard.window=3"]
    assert train_here(tmp_path / "a", data, *settings) == 0
    for step in (8, 16, 27):
        at_step(monkeypatch, step, die)
        with pytest.raises(Killed):
            train_here(tmp_path / "b", data, *settings)
    assert train_here(tmp_path / "b", data, *settings) == 0
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    one, other = ((tmp_path / n / "run" / "skipped.jsonl").read_text() for n in "ab")
    assert one == other and outcome(tmp_path / "a") == outcome(tmp_path / "b")


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that training refuses with."""
    capsys.readouterr()
    assert train.main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trainer.train: error: ")]
    assert len(lines) == 1
    written = [p for p in (folder / "run").rglob("*") if p.suffix == ".safetensors" or p.name == "latest"]
    assert not written
    return lines[0]


def test_refuses_bad_data(tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(data: Path, *overrides: str) -> str:
        return refusal(tmp_path, capsys, *arguments(tmp_path, data, *overrides))

    assert "nowhere" in said(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "manifest.json" in said(tmp_path / "empty")
    foreign = write_data(tmp_path / "foreign")
    edit_json(foreign / "manifest.json", schema=99)
    assert "schema" in said(foreign)
    out_of_range = write_data(tmp_path / "labels")
    edit_json(out_of_range / "manifest.json", concepts=CONCEPTS[:2])
    message = said(out_of_range, "data.retries=0")
    assert "concept label" in message and "0..1" not in message.split("train-")[0] and "train-000000.tar" in message
    assert "no concepts" in said(write_data(tmp_path / "bare", concepts=[]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dictionary.free_slot=5", ["free_slot", "'dictionary.free_slots'"]),
        ("data.lanes=5", ["data.lanes=5", "global_batch"]),
        ("data.global_batch=100000", ["496 rows", "global_batch"]),
        ("optim.lr=fast", ["optim.lr"]),
        ("stages=[]", ["stages"]),
        ("checkpoint.on_error=ignore", ["continue or stop"]),
        ("checkpoint.keep=0", ["checkpoint.keep=0"]),
        ("guard.spike=0.5", ["guard.spike=0.5"]),
        ("run.wall_minutes=-1", ["run.wall_minutes"]),
        ("checkpoint.resume=/nowhere", ["/nowhere", "no usable checkpoint"]),
        ("parallel.strategy=ddq", ["ddq", "zero"]),
        ("data.unlabelled=none", ["loss.binding=softmax", "loss.binding=sigmoid"]),
    ],
)
def test_refuses_bad_settings(
    override: str, words: list[str], tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(tmp_path, capsys, *arguments(tmp_path, small_data, override))
    assert all(word in message for word in words), message


def test_refuses_a_checkpoint_of_something_else(
    undisturbed: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = f"checkpoint.resume={undisturbed / 'run'}"

    def said(data: Path, *overrides: str) -> str:
        return refusal(tmp_path, capsys, *arguments(tmp_path, data, resume, *overrides))

    assert f"width={WIDTH}" in said(write_data(tmp_path / "wide", width=16))
    assert "concepts=['born'" in said(write_data(tmp_path / "named", concepts=["born", "studied", "lives"]))
    assert "manifest" in said(write_data(tmp_path / "more", rows=600))
    assert "free_slots=40" in said(small_data, "dictionary.free_slots=48")
    assert "seed=0" in said(small_data, "run.seed=4")
    assert "lanes" in said(small_data, "data.lanes=8")


def test_does_not_mix_with_later_checkpoints(
    undisturbed: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((undisturbed / "run" / "checkpoints").rglob("*"))
    assert train_here(undisturbed, small_data, "checkpoint.resume=none") == 2
    assert f"checkpoints up to step {TOTAL}" in capsys.readouterr().err
    assert sorted((undisturbed / "run" / "checkpoints").rglob("*")) == before


def test_a_finished_run_stays_finished(undisturbed: Path, small_data: Path) -> None:
    before = digests(undisturbed)
    assert train_here(undisturbed, small_data) == 0
    assert digests(undisturbed) == before and outcome(undisturbed)["status"] == "finished"
