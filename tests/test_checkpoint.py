"""Checkpoints: what is trusted, what is kept, what a hostile or damaged folder can do."""

import json
import os
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.runs import TOTAL, assert_same, edit_json, outcome, tensors, train_here
from trainer.checkpoint import find, load_dictionary, read_state, refuse_later, saver, verify
from trainer.checkpoint.files import clean
from trainer.checkpoint.tensorfile import TensorFile
from trainer.errors import DataError, UserError


@pytest.fixture(scope="module")
def trained(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run with three checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    assert train_here(folder, small_data, "checkpoint.every=10", "checkpoint.keep=3") == 0
    return folder


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoints folder."""
    return Path(shutil.copytree(trained / "run" / "checkpoints", tmp_path / "run" / "checkpoints"))


def newest(root: Path) -> Path:
    return root / (root / "latest").read_text().strip()


def test_every_flipped_byte_and_cut_is_named(root: Path) -> None:
    folder = newest(root)
    assert verify(folder) is None
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("COMPLETE", "hashes.json"))
    assert len(files) == 2 * 6 + 2  # concepts, output, value and three banks, twice; state and manifest
    for path in files:
        whole = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert name in (verify(folder) or ""), (name, place)
        for damage in (whole[:-1], whole + b"x", b""):
            path.write_bytes(damage)
            assert name in (verify(folder) or "")
        path.unlink()
        assert name in (verify(folder) or "")
        path.write_bytes(whole)
    assert verify(folder) is None
    (folder / "COMPLETE").unlink()
    assert verify(folder) == "it was not completed"


def test_a_dictionary_is_read_while_a_run_replaces_its_checkpoints(root: Path) -> None:
    source, over, made = Path(shutil.copytree(newest(root), root.parent / "source")), threading.Event(), 0

    def replace() -> None:
        """What a run with checkpoint.keep=1 and steps of some hundredths of a second does."""
        nonlocal made
        step, before = TOTAL, sorted(root.glob("step-*"))
        while not over.wait(0.03):
            step += 1
            final = root / f"step-{step:08d}"
            Path(shutil.copytree(source, root / f"step-{step:08d}.tmp")).rename(final)
            for folder in before:
                shutil.rmtree(folder)
            before, made = [final], made + 1

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        while made < 20 and thread.is_alive():
            assert load_dictionary(root.parent)[0].concept_names
    finally:
        over.set()
        thread.join()
    assert made >= 20


def test_ranks_share_the_hashing(root: Path) -> None:
    folder = newest(root)
    victim = folder / "optimizer" / "bank-00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    found = [verify(folder, part, 3) for part in range(3)]
    assert sum(reason is not None for reason in found) == 1


def test_resume_takes_the_newest_that_verifies(root: Path) -> None:
    folders = sorted(root.glob("step-*"), reverse=True)
    assert find("auto", root) == (folders[0], [])
    (folders[0] / "COMPLETE").unlink()
    (folders[1] / "state.json").write_text("{}")
    found, skipped = find("auto", root)
    assert found == folders[2]
    assert [line.split(": ")[0] for line in skipped] == [str(folders[0]), str(folders[1])]
    assert "not completed" in skipped[0] and "state.json" in skipped[1]
    assert find("none", root) == (None, [])
    for path in (root, root.parent, folders[2]):
        assert find(str(path), root)[0] == folders[2]
    with pytest.raises(UserError, match="not completed"):
        find(str(root / "latest"), root)
    shutil.rmtree(folders[2])
    with pytest.raises(UserError, match=r"no checkpoint of .* can be used"):  # a start anew would wipe its figures
        find("auto", root)
    with pytest.raises(UserError, match="no usable checkpoint"):
        find(str(root), root)


def test_a_damaged_checkpoint_costs_only_its_steps(trained: Path, root: Path, small_data: Path) -> None:
    for name in (f"step-{TOTAL:08d}", "step-00000030"):
        (root / name / "dictionary" / "bank-00000.safetensors").write_bytes(b"no")
    folder = root.parent.parent
    assert train_here(folder, small_data, "checkpoint.every=10", "checkpoint.keep=3") == 0
    assert_same(tensors(trained), tensors(folder))
    assert verify(newest(root)) is None


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_retention_counts_verified_checkpoints_only(asynchronous: str, small_data: Path, tmp_path: Path) -> None:
    often = ["checkpoint.every=2", "checkpoint.keep=3", f"checkpoint.asynchronous={asynchronous}"]

    root = tmp_path / "run" / "checkpoints"

    def kept_after(steps: int) -> list[int]:
        assert train_here(tmp_path, small_data, *often, f"stages=[{{name: pretrain, steps: {steps}}}]") == 0
        return sorted(int(p.name.removeprefix("step-")) for p in root.glob("step-*"))

    assert kept_after(10) == [6, 8, 10]
    (root / "step-00000008" / "state.json").write_text("{}")
    # The damaged one does not count, so 6 is still needed; it stays itself, to be looked at.
    assert kept_after(12) == [6, 8, 10, 12]
    assert kept_after(14) == [10, 12, 14]


def test_leftovers_are_cleaned_and_the_one_that_stood_aside_returns(root: Path) -> None:
    (root / "step-00000099.tmp" / "dictionary").mkdir(parents=True)
    (root / "latest.tmp").write_text("step")
    (root / "step-00000040").rename(root / "step-00000040.old")
    clean(root)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000020", "step-00000030", "step-00000040"]
    assert verify(root / "step-00000040") is None
    shutil.copytree(root / "step-00000030", root / "step-00000030.old")
    clean(root)
    assert not (root / "step-00000030.old").exists()


def test_refuses_to_start_before_later_checkpoints(root: Path) -> None:
    refuse_later(root, TOTAL)
    with pytest.raises(UserError, match="up to step 40"):
        refuse_later(root, 30)


def test_dictionary_is_that_of_the_newest(trained: Path) -> None:
    dictionary, _ = load_dictionary(trained / "run")
    stored = tensors(trained)
    assert torch.equal(dictionary.concepts.W_enc, stored["dictionary/concepts/W_enc"])
    older, _ = load_dictionary(trained / "run" / "checkpoints" / "step-00000020")
    assert not torch.equal(older.output.b_dec, dictionary.output.b_dec)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = ["schema", "step", "updates", "stage", "seed", "stream", "rows_digest", "dictionary", "guard", "damage"]
_FORM = ["width", "concepts", "answers", "free_slots", "bank_slots", "decoder_norm", "value_hidden"]


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(_FIELDS + _FORM), value=_JSON)
def test_hostile_state_is_refused_in_one_line(name: str, value: object, trained: Path) -> None:
    folder = trained / "run" / "checkpoints" / f"step-{TOTAL:08d}"
    whole = (folder / "state.json").read_text()
    state = json.loads(whole)
    (state["dictionary"] if name in _FORM else state)[name] = value
    try:
        (folder / "state.json").write_text(json.dumps(state))
        read_state(folder)
    except DataError as error:
        assert "\n" not in str(error) and "state.json" in str(error)
    finally:
        (folder / "state.json").write_text(whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("guard", value) for value in ("", None, 7)),
        *(("guard", {"losses": value}) for value in ([10**400], ["x"], None)),
        ("guard", []),
        ("damage", []),
        *(("guard", {"skipped": value}) for value in ("x", None, 10**400, -1, True, 1.5)),
        *(("guard", {"in_a_row": value}) for value in ("x", None, 10**400, -1, True, 1.5)),
        ("guard", {"stage": 3}),
        *(("damage", value) for value in ("", None)),
        *(("damage", {"rows": value}) for value in ("x", None, 10**400, -1)),
    ],
    ids=repr,
)  # fmt: skip
def test_a_damaged_guard_or_damage_is_refused_in_one_line(name: str, value: object, root: Path) -> None:
    edit_json(newest(root) / "state.json", **{name: value})
    with pytest.raises(DataError, match=rf"state\.json: .*{name}.*resume from another checkpoint") as caught:
        read_state(newest(root))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_states_without_guard_and_damage_still_load(root: Path) -> None:
    """As do those whose guard has fewer fields, or counters that this version does not know."""
    path = newest(root) / "state.json"
    whole = json.loads(path.read_text())
    for guard in ({}, {"skipped": 3}, {"skipped": 3, "in_a_row": 1, "stage": "align", "losses": [1, 2.5]}):
        edit_json(path, guard=guard)
        found = read_state(path.parent).guard
        assert asdict(found) == {"skipped": 0, "in_a_row": 0, "stage": "", "losses": []} | guard
    path.write_text(json.dumps({k: v for k, v in whole.items() if k not in ("guard", "damage")}))
    assert (read_state(path.parent).guard.skipped, read_state(path.parent).damage) == (0, {})


@pytest.mark.parametrize("name", ["state.json", "hashes.json", "manifest.json"])
def test_a_named_pipe_is_not_waited_for(name: str, root: Path) -> None:
    path = newest(root) / name
    path.unlink()
    os.mkfifo(path)
    assert name in (verify(newest(root)) or "")


@pytest.mark.parametrize("text", ["", "[", "[]", "null", '{"schema": 1}', "[" * 100_000, "\x00", '{"schema": NaN}'])
def test_malformed_json_is_refused_in_one_line(text: str, root: Path) -> None:
    for name in ("state.json", "hashes.json"):
        path = newest(root) / name
        whole = path.read_text()
        path.write_text(text)
        reason = verify(newest(root))
        assert reason and "\n" not in reason
        path.write_text(whole)


def test_hash_list_cannot_lead_out_of_the_folder_or_ask_for_memory(root: Path) -> None:
    folder = newest(root)
    hashes = json.loads((folder / "hashes.json").read_text())
    for name in ("../../latest", "/etc/hostname", "dictionary/../state.json", "dictionary/x.pt"):
        (folder / "hashes.json").write_text(json.dumps(hashes | {name: {"bytes": 1, "xxh3_128": "0"}}))
        assert "no file of a checkpoint" in (verify(folder) or "")
    (folder / "hashes.json").write_text(json.dumps(hashes))
    state = json.loads((folder / "state.json").read_text())
    for change in ({"free_slots": 1 << 39}, {"free_slots": 1 << 39, "bank_slots": 1 << 39}, {"width": 1 << 19}):
        edit_json(folder / "state.json", dictionary=state["dictionary"] | change)
        assert any(word in (verify(folder) or "") for word in ("too few", "use larger banks"))


@pytest.mark.parametrize("part", ["dictionary", "optimizer"])
def test_tensors_of_another_shape_are_refused(part: str, root: Path, small_data: Path, capsys) -> None:
    """Even when the hashes were made to fit."""
    folder = newest(root)
    path = folder / part / "bank-00001.safetensors"
    changed = {name: t[..., :-1].contiguous() if t.dim() == 2 else t for name, t in load_file(path).items()}
    least = path.stat().st_size
    save_file({**changed, "padding": torch.zeros(least)}, path)
    hashes = json.loads((folder / "hashes.json").read_text())
    hashes[f"{part}/bank-00001.safetensors"] = saver.seal(path)
    (folder / "hashes.json").write_text(json.dumps(hashes))
    assert train_here(root.parent.parent, small_data) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "bank-00001.safetensors" in error and "shape" in error


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The next `times` tensor files do not fit on the disk."""
    original, left = TensorFile.write, [times]

    def write(self, path, metadata):
        if left[0] > 0:
            left[0] -= 1
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return original(self, path, metadata)

    monkeypatch.setattr(TensorFile, "write", write)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_failed_save_is_reported_and_the_run_goes_on(
    asynchronous: str, trained: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    failing(monkeypatch, 2)  # each save gives up at its first failure
    settings = ["checkpoint.every=10", "checkpoint.keep=3", f"checkpoint.asynchronous={asynchronous}"]
    assert train_here(tmp_path, small_data, *settings) == 0
    messages = [r.getMessage() for r in caplog.records if "was not saved" in r.getMessage()]
    assert len(messages) == 2 and all("No space left" in m and "training goes on" in m for m in messages)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "latest", "step-00000030", f"step-{TOTAL:08d}",
    ]  # fmt: skip
    assert_same(tensors(trained), tensors(tmp_path))


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_failed_save_stops_the_run_where_asked(
    asynchronous: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    settings = ["checkpoint.every=10", "checkpoint.on_error=stop", f"checkpoint.asynchronous={asynchronous}"]
    with monkeypatch.context() as patch:
        original = saver.Saver.save

        def save(self, state, **rest):
            if state.step == 20:
                self.wait()  # step 10's file is whole
                failing(patch, 99)
            original(self, state, **rest)

        patch.setattr(saver.Saver, "save", save)
        assert train_here(tmp_path, small_data, *settings) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step-00000020 was not saved" in error and "the last good one is step-00000010" in error
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-00000010"]
    assert verify(tmp_path / "run" / "checkpoints" / "step-00000010") is None
    assert outcome(tmp_path)["status"] == "failed"
    assert train_here(tmp_path, small_data, *settings) == 0


def test_the_last_save_must_not_fail_quietly(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    failing(monkeypatch, 99)
    assert train_here(tmp_path, small_data) == 2
    assert f"step-{TOTAL:08d} was not saved" in capsys.readouterr().err.splitlines()[-1]


OLD = Path(__file__).parent / "old_checkpoint"  # written by version 0.1.0 at fd412eb, with what that version made of it


def test_a_checkpoint_of_an_earlier_version_loads() -> None:
    assert verify(OLD / "step-00000021") is None
    dictionary, _ = load_dictionary(OLD / "step-00000021")
    expected = json.loads((OLD / "expected.json").read_text())
    code = dictionary.encode(torch.linspace(-2, 2, 36).reshape(3, 12))
    torch.testing.assert_close(code, torch.tensor(expected["code"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dictionary.decode(code), torch.tensor(expected["decoded"]), rtol=1e-5, atol=1e-5)
    state = read_state(OLD / "step-00000021")
    assert state.dictionary.gate == "relu" and state.curriculum is None and state.awake
