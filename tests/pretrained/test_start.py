"""`dictionary.start_from` and `dictionary.freeze`: a run that begins with what others trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.pretrained.foreign import SLOTS, WIDTH, gemma_scope, saelens, weights
from tests.support.data import write_data
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, assert_same, edit_json, metrics, tensors, train_here, train_rank
from tools.cli import main
from trainer import load, pretrained
from trainer.analysis.results import rows_of
from trainer.analysis.rivals import training_rows
from trainer.analysis.steering import SlotEdit
from trainer.checkpoint import load_dictionary
from trainer.errors import DataError

ALIGN = "stages=[{name: align, epochs: 3}]"


@pytest.fixture
def source(tmp_path) -> Path:
    """An imported dictionary with one threshold for all slots, whose decoder rows have a norm of about 1."""
    tensors = weights() | {"threshold": torch.full((SLOTS,), 0.5)}
    metadata = {"training_architecture_details": {"k": 7.0}}
    saelens(tmp_path / "sae", "jumprelu", tensors=tensors, metadata=metadata)
    assert main(["import", str(tmp_path / "sae"), "--out", str(tmp_path / "source")]) == 0
    return tmp_path / "source"


def free_slots(folder: Path) -> tuple[torch.Tensor, ...]:
    """Code of the free slots of the newest checkpoint on raw rows, reconstruction by them alone, and the rows."""
    dictionary, _ = load_dictionary(folder / "run")
    h = 3.0 * torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2))
    code = dictionary.encode(h)
    code[:, : len(dictionary.concept_names)] = 0.0
    return code[:, len(dictionary.concept_names) :], dictionary.decode(code), h


def test_align_alone_names_slots_and_leaves_the_others_as_they_are(tmp_path, small_data, source):
    start = f"dictionary.start_from={source}"
    assert train_here(tmp_path, small_data, ALIGN, start, "dictionary.freeze=free", "optim.lr=0.01") == 0
    lines = metrics(tmp_path)
    assert lines[max(lines)]["binding"] > 0.8
    imported = pretrained.load(source)
    code, _, h = free_slots(tmp_path)
    torch.testing.assert_close(code, imported.encode(h), rtol=1e-4, atol=1e-4)
    assert load_dictionary(tmp_path / "run")[0].form.k == 7
    assert (tmp_path / "run" / "config.yaml").read_text().count("gate: batch_topk") == 1


def test_slots_beside_held_ones_write_what_their_concepts_add(tmp_path, small_data, source, caplog):
    """Setting a slot writes the difference that its concept makes, in the run, its exports and imports of those; what
    is reconstructed stays."""
    chosen = [ALIGN, f"dictionary.start_from={source}", "dictionary.freeze=free", "checkpoint.every=10"]
    assert train_here(tmp_path, small_data, *chosen) == 0
    assert load(tmp_path / "run" / "checkpoints" / "step-00000020").dictionary.written is None
    assert "is not known; the end of a run" in caplog.text
    trained = load(tmp_path / "run")
    slots = range(len(trained.concepts))
    edit = SlotEdit(trained.dictionary, slots, "set", torch.full((1, len(slots)), torch.nan), "cpu")
    rows = training_rows(rows_of([str(small_data)], trained.dictionary)[0], len(slots))
    means = torch.stack([rows.acts[rows.member[:, number]].mean(dim=0) for number in slots])
    gains = torch.tensor([trained.gains[name] for name in trained.concepts])
    torch.testing.assert_close(edit.rows * gains[:, None], means - means.mean(dim=0), rtol=0.05, atol=0.05)
    run = str(tmp_path / "run")
    for form in ("huggingface", "safetensors"):
        exported, unit = tmp_path / form, tmp_path / f"{form}-unit"
        assert main(["export", "--run", run, "--out", str(exported), "--format", form]) == 0
        assert main(["export", "--run", run, "--out", str(unit), "--format", form, "--unit-norm"]) == 0
        assert main(["import", str(exported), "--out", str(tmp_path / f"{form}-in")]) == 0
        for folder in (exported, unit, tmp_path / f"{form}-in"):
            other = load(folder)
            again = SlotEdit(other.dictionary, slots, "set", torch.full((1, len(slots)), torch.nan), "cpu")
            theirs = torch.tensor([other.gains[name] for name in other.concepts])
            torch.testing.assert_close(again.rows * theirs[:, None], edit.rows * gains[:, None])
    assert "`W_write` in `concepts.safetensors`" in (tmp_path / "huggingface" / "README.md").read_text()
    save_file({"W_write": torch.zeros(2, WIDTH + 1)}, tmp_path / "huggingface" / "concepts.safetensors")
    with pytest.raises(DataError, match="W_write has shape"):
        load(tmp_path / "huggingface")


def test_what_is_held_costs_no_moments(tmp_path, small_data, source):
    assert train_here(tmp_path, small_data, ALIGN, f"dictionary.start_from={source}", "dictionary.freeze=free") == 0
    checkpoint = tmp_path / "run" / "checkpoints" / (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    for unit, held in (("bank-00000", True), ("concepts", False), ("output", False), ("value", False)):
        with safe_open(checkpoint / "optimizer" / f"{unit}.safetensors", framework="pt") as file:
            assert (not list(file.keys())) == held
    before = load_file(source / "bank-00000.safetensors")
    after = load_file(checkpoint / "dictionary" / "bank-00000.safetensors")
    scale = load_dictionary(tmp_path / "run")[0].scale
    torch.testing.assert_close(after["W_dec"], before["W_dec"][:16] / scale)
    assert torch.equal(after["theta"], torch.tensor([0.5]))


def test_slots_that_are_trained_on_begin_in_units_of_the_data(tmp_path, small_data, source):
    """The same reconstruction, codes in other units: the decoder rows have a mean norm of 1, as in a new dictionary."""
    chosen = [f"dictionary.start_from={source}", "stages=[{name: pretrain, steps: 1}]", "optim.lr=0", "dictionary.k=9"]
    assert train_here(tmp_path, small_data, *chosen) == 0
    dictionary, _ = load_dictionary(tmp_path / "run")
    norms = torch.cat([bank.W_dec.norm(dim=1) for bank in dictionary.free_banks()])
    assert float(norms.mean()) == pytest.approx(1.0, rel=1e-5)
    imported = pretrained.load(source)
    # One step of following moves the threshold by at most a fifth, so the codes are compared where they are large.
    code, _, h = free_slots(tmp_path)
    theirs = imported.encode(h)
    large = theirs > 1.0
    gain = float(load_dictionary(tmp_path / "run")[0].scale)
    ratio = (theirs[large] / code[large]) / gain
    assert float(ratio.std()) < 1e-4


def test_training_on_moves_the_free_slots(tmp_path, small_data, source):
    start = f"dictionary.start_from={source}"
    assert train_here(tmp_path, small_data, "stages=[{name: pretrain, epochs: 4}]", start, "optim.lr=0.003") == 0
    lines = metrics(tmp_path)
    assert lines[max(lines)]["fvu"] < 0.8 * lines[min(lines)]["fvu"]


def test_the_best_checkpoint_beside_held_slots_knows_what_they_write_and_changes_nothing(tmp_path, small_data, source):
    chosen = [ALIGN, f"dictionary.start_from={source}", "dictionary.freeze=free"]
    heldout = write_data(tmp_path / "heldout", rows=150)
    held = [f"data.heldout={heldout}", "run.evaluate_every=6", "checkpoint.best=heldout/fvu", "checkpoint.keep=9"]
    assert train_here(tmp_path / "plain", small_data, *chosen) == 0
    assert train_here(tmp_path / "best", small_data, *chosen, *held) == 0
    ours, theirs = tensors(tmp_path / "plain"), tensors(tmp_path / "best")
    assert_same(ours, theirs)
    saved = tmp_path / "best" / "run" / "checkpoints"
    assert load(saved / "step-00000007").dictionary.written is None  # none of the best: FVU falls at each of the others
    for step in (6, 12, 18):
        trained = load(saved / f"step-{step:08d}")
        assert trained.dictionary.written is not None and len(trained.gains) == len(trained.concepts)


@pytest.mark.parametrize("freeze", ["none", "free"])
def test_a_resume_does_not_need_the_source(tmp_path, small_data, source, freeze):
    chosen = [f"dictionary.start_from={source}", f"dictionary.freeze={freeze}", "stages=[{name: align, steps: 20}]"]
    assert train_here(tmp_path / "whole", small_data, *chosen) == 0
    assert train_here(tmp_path / "cut", small_data, *chosen, "checkpoint.keep=5") == 0
    for step in (20, 14):
        shutil.rmtree(tmp_path / "cut" / "run" / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(source)
    assert train_here(tmp_path / "cut", small_data, *chosen) == 0
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))


def assert_refused(tmp_path, capsys, reason: str, data: Path, *chosen: str) -> None:
    """One line, exit code 2, no run folder."""
    assert train_here(tmp_path, data, *chosen) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line
    assert not (tmp_path / "run").exists()


def test_refusals(tmp_path, small_data, source, capsys):
    start = f"dictionary.start_from={source}"
    for reason, *chosen in (
        ("holds slots that know nothing", "dictionary.freeze=free"),
        ("dictionary.freeze='all' is unknown", "dictionary.freeze=all", start),
        ("stage pretrain trains the free slots", start, "dictionary.freeze=free"),
        ("dictionary.free_slots=41, but", start, "dictionary.free_slots=41"),
        ("dictionary.gate=jumprelu, but", start, "dictionary.gate=jumprelu"),
        ("does not go with dictionary.start_from", start, "dictionary.decoder_norm=unit"),
        ("holds no dictionary.json", f"dictionary.start_from={tmp_path / 'sae'}"),
    ):
        assert_refused(tmp_path, capsys, reason, small_data, *chosen)


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"model": "gpt2"}, "is of the model gpt2, data.shards of none"),
        ({"hook_point": "blocks.2.hook_resid_post"}, "is of the hook point blocks.2.hook_resid_post"),
    ],
)
def test_another_model_or_hook_point(tmp_path, small_data, source, capsys, change, reason):
    facts = json.loads((source / "dictionary.json").read_text())["facts"]
    edit_json(source / "dictionary.json", facts=facts | change)
    assert_refused(tmp_path, capsys, reason, small_data, f"dictionary.start_from={source}")


def test_another_width(tmp_path, source, capsys):
    data = write_data(tmp_path / "wide", width=16)
    assert_refused(
        tmp_path, capsys, "has width 12, the rows of data.shards have 16", data, f"dictionary.start_from={source}"
    )


def test_held_and_trained_runs_do_not_resume_each_other(tmp_path, small_data, source, capsys):
    start = f"dictionary.start_from={source}"
    assert train_here(tmp_path, small_data, ALIGN, start, "dictionary.freeze=free") == 0
    capsys.readouterr()
    assert train_here(tmp_path, small_data, ALIGN, start) == 2
    assert "was made with dictionary.freeze=free, not none" in capsys.readouterr().err


def test_per_slot_thresholds_are_held_or_trained(tmp_path, small_data):
    gemma_scope(tmp_path / "gemma")
    assert main(["import", str(tmp_path / "gemma"), "--out", str(tmp_path / "source")]) == 0
    start, theirs = f"dictionary.start_from={tmp_path / 'source'}", pretrained.load(tmp_path / "source")
    assert train_here(tmp_path, small_data, ALIGN, start, "dictionary.freeze=free") == 0
    code, _, h = free_slots(tmp_path)
    torch.testing.assert_close(code, theirs.encode(h), rtol=1e-4, atol=1e-4)
    assert train_here(tmp_path / "on", small_data, ALIGN, start, "loss.sp=0.01", "loss.bandwidth=0.5") == 0
    dictionary, _ = load_dictionary(tmp_path / "on/run")
    before, after = (torch.cat([bank.get_parameter("level") for bank in d.free_banks()]) for d in (theirs, dictionary))
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "strategy,freeze",
    [(name, "free") for name in ("ddp", "dictionary", "zero3")]
    + [("ddp", "none"), ("zero3", "none")]
    + [pytest.param(name, "free", marks=pytest.mark.slow) for name in ("zero1", "zero2")],
)
def test_two_ranks_end_where_one_does(tmp_path, small_data, source, strategy, freeze):
    """With best evaluations on the way, at which what concept slots write is measured."""
    chosen = [f"dictionary.start_from={source}", f"dictionary.freeze={freeze}", "stages=[{name: align, steps: 12}]"]
    chosen += [f"data.heldout={write_data(tmp_path / 'heldout', rows=150)}", "run.evaluate_every=4"]
    chosen += ["checkpoint.best=heldout/fvu"]
    assert train_here(tmp_path / "one", small_data, *chosen) == 0
    run_ranks(2, train_rank, arguments(tmp_path / "two", small_data, *chosen, f"parallel.strategy={strategy}"))
    mine, theirs = tensors(tmp_path / "two"), tensors(tmp_path / "one")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5, msg=name)
