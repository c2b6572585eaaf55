"""finetune-lm: what the loss covers, batch order, resume, accuracy, bad input. Two-layer models, a few persons."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tools.cli import main
from tools.lm_training import checkpoint
from tools.lm_training.batches import Example, Shuffled, collate, encode_question, encode_text
from tools.lm_training.models import build_model, build_tokenizer
from tools.lm_training.score import answer_accuracy, known_answers, predicted_logits
from trainer.language_model import Prompt, answer_matches, generate_answers, load_language_model, read_prompts

TINY = [
    *("--layers", "2", "--width", "32", "--heads", "2", "--vocabulary", "500"),
    *("--questions-per-step", "16", "--texts-per-step", "4", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "b"
    assert main(["biographies", "--out", str(out), "--persons", "2", "--variants", "2"]) == 0
    return out


def finetune(data: Path, out: Path, *arguments: str) -> int:
    return main(["finetune-lm", *TINY, "--data", str(data), "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def taught(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "lm"
    assert finetune(data, out, "--steps", "150", "--lr", "1e-2", "--warmup", "10") == 0
    return out


def test_it_learns_the_answers_and_reports_what_greedy_decoding_gives(data: Path, taught: Path) -> None:
    model, tokenizer = load_language_model(taught)
    prompts = read_prompts(data / "questions.jsonl")
    texts = generate_answers(model, tokenizer, [p.prompt for p in prompts], max_new_tokens=24)
    right = [answer_matches(t, p.answer) for t, p in zip(texts, prompts, strict=True)]
    report = json.loads((taught / "lm_report.json").read_text())
    assert report["answer_accuracy"] == sum(right) / len(right) >= 0.9
    assert known_answers(model, tokenizer, prompts, batch_size=7) == right
    assert report["questions"] == len(prompts) == 48
    assert set(report["split"]) == {"train", "heldout"}
    assert list(report["relation"]) == list(dict.fromkeys(p.concept for p in prompts))
    assert len(report["template"]) == 24
    assert {p.name for p in taught.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (taught / checkpoint.NAME).exists() and not taught.with_name("lm.partial").exists()


def test_a_wrong_token_anywhere_in_the_answer_counts_as_wrong(data: Path, taught: Path) -> None:
    model, tokenizer = load_language_model(taught)
    prompts = read_prompts(data / "questions.jsonl")[:8]
    longer = [Prompt(p.prompt, p.answer + " x", p.concept) for p in prompts]
    cut = [Prompt(p.prompt, p.answer[: len(p.answer) // 2], p.concept) for p in prompts]
    assert not any(known_answers(model, tokenizer, longer + cut))


def test_accuracy_is_counted_per_group() -> None:
    prompts = [
        Prompt("q", "a", "x", "0", "train"),
        Prompt("q", "a", "x", "1", "heldout"),
        Prompt("q", "a", "y", "0", "train"),
    ]
    report = answer_accuracy(prompts, [True, False, False])
    assert report["answer_accuracy"] == pytest.approx(1 / 3)
    assert report["split"] == {"train": 0.5, "heldout": 0.0}
    assert report["relation"] == {"x": 0.5, "y": 0.0}
    assert report["template"] == {"x/0": 1.0, "x/1": 0.0, "y/0": 0.0}


def test_the_loss_covers_the_answer_of_a_question_and_all_of_a_text() -> None:
    tokenizer = build_tokenizer(["Q: Who is it?\nA: Ada Ash"], 300)
    question = encode_question(tokenizer, Prompt("Q: Who is it?\nA:", "Ada Ash", "who"))
    short = encode_question(tokenizer, Prompt("Q: Who?\nA:", "Bo", "who"))
    batch = collate([question, short], tokenizer.pad_token_id)
    end = [tokenizer.eos_token_id]
    expected = tokenizer(" Ada Ash")["input_ids"] + end + tokenizer(" Bo")["input_ids"] + end
    assert batch.targets().tolist() == expected
    (text,) = encode_text(tokenizer, "Ada Ash", context=64)
    assert collate([text], 1).targets().tolist() == text.ids[1:] == tokenizer("Ada Ash")["input_ids"][1:] + end
    assert [len(e.ids) for e in encode_text(tokenizer, "Ada Ash " * 9, context=8)][:-1] == [8] * (
        len(tokenizer("Ada Ash " * 9)["input_ids"]) // 8
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_logits_at_predicted_positions_are_those_of_the_plain_forward(architecture: str) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["abc abd"], 258)
    model = build_model(architecture, tokenizer, layers=2, width=16, heads=2, context=32).eval()
    batch = collate([Example([3, 4, 5, 6], 2), Example([7, 8, 9, 10, 11, 12], 3)], tokenizer.pad_token_id)
    with torch.no_grad():
        for row, length, predicted in ((0, 4, 2), (1, 6, 3)):
            plain = model(input_ids=batch.ids[row : row + 1, :length]).logits[0, length - 1 - predicted : length - 1]
            chosen = predicted_logits(model, batch)[batch.predict.nonzero()[:, 0] == row]
            torch.testing.assert_close(chosen, plain)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 3))
def test_an_epoch_shows_no_example_twice_and_steps_are_reproducible(count: int, size: int, seed: int) -> None:
    examples = [Example([i + 10] * (2 + i % 5), 1) for i in range(count)]
    batches, again = Shuffled(examples, size, 0, seed), Shuffled(examples, size, 0, seed)
    per_epoch = count // min(size, count)
    for epoch in range(2):
        seen = [int(i) for s in range(per_epoch) for i in batches[epoch * per_epoch + s].ids[:, 0]]
        assert len(set(seen)) == len(seen) == per_epoch * min(size, count)
    assert torch.equal(again[per_epoch].ids, batches[per_epoch].ids)


def test_an_interrupted_run_ends_with_the_same_weights(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    arguments = ["--steps", "12", "--checkpoint-every", "5"]
    assert finetune(data, tmp_path / "whole", *arguments) == 0
    calls = 0

    def dies(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 2 * 8:  # questions and texts of eight steps
            raise KeyboardInterrupt
        return predicted_logits(*args)

    with monkeypatch.context() as patch:
        patch.setattr("tools.finetune_lm.predicted_logits", dies)
        assert finetune(data, tmp_path / "cut", *arguments) == 130
    assert not (tmp_path / "cut").exists()
    assert json.loads((tmp_path / "cut.partial/checkpoint/state.json").read_text())["step"] == 5
    assert finetune(data, tmp_path / "cut", *arguments) == 0
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.fixture
def stopped(data: Path, tmp_path: Path, monkeypatch: Any) -> Path:
    """OUT of a run that was interrupted behind its first checkpoint."""
    monkeypatch.setattr("tools.finetune_lm.known_answers", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert finetune(data, tmp_path / "lm", "--steps", "2", "--checkpoint-every", "1") == 130
    monkeypatch.undo()
    return tmp_path / "lm"


def test_a_checkpoint_of_other_settings_is_refused(data: Path, stopped: Path, capsys: Any) -> None:
    assert finetune(data, stopped, "--steps", "2", "--lr", "0.5") == 2
    assert "made with another lr" in capsys.readouterr().err


def test_a_checkpoint_of_other_data_is_refused(data: Path, stopped: Path, capsys: Any) -> None:
    path = data / "biographies.jsonl"
    original = path.read_text()
    try:
        path.write_text(original.replace("was born", "came to be"))
        assert finetune(data, stopped, "--steps", "2", "--checkpoint-every", "1") == 2
    finally:
        path.write_text(original)
    assert "made with another content of the data" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(data: Path, stopped: Path, capsys: Any, name: str) -> None:
    path = stopped.with_name("lm.partial") / checkpoint.NAME / name
    path.write_bytes(path.read_bytes()[:20])
    assert finetune(data, stopped, "--steps", "2", "--checkpoint-every", "1") == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_saved_model_is_fine_tuned_with_its_own_tokenizer(data: Path, taught: Path, tmp_path: Path) -> None:
    out = tmp_path / "lm"
    assert finetune(data, out, "--model", str(taught), "--steps", "2", "--lr", "1e-5", "--precision", "bf16") == 0
    assert (out / "tokenizer.json").read_bytes() == (taught / "tokenizer.json").read_bytes()
    before, after = load_file(taught / "model.safetensors"), load_file(out / "model.safetensors")
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 1e-3


def test_questions_of_the_training_split_alone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "lm"
    questions = ["--questions", str(data / "questions.jsonl")]
    arguments = ["--templates", "train", "--steps", "60", "--lr", "1e-2", "--warmup", "5"]
    assert main(["finetune-lm", "--from-scratch", "llama", *TINY, *questions, "--out", str(out), *arguments]) == 0
    split = json.loads((out / "lm_report.json").read_text())["split"]
    assert split["train"] > split["heldout"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--questions", "none.jsonl"], "cannot read none.jsonl"),
        (["--field", "body"], "no text field 'body'; found subject, text, variant"),
        (["--steps", "0"], "--steps 0"),
        (["--width", "30", "--heads", "4"], "not divisible by --heads 4"),
        (["--vocabulary", "100"], "needs at least 258"),
        (["--context", "8"], "more than --context 8"),
        (["--from-scratch", "nonsense"], "--from-scratch nonsense"),
        (["--model", "no/such/folder"], "cannot load a language model from 'no/such/folder'"),
        (["--lr", "1e20", "--steps", "30", "--clip", "1e30"], "loss is not finite"),
    ],
)
def test_bad_input_is_one_line(data: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    assert finetune(data, tmp_path / "lm", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("alignsae: error: ") and message in error
    assert not (tmp_path / "lm").exists()


def test_without_data_there_is_nothing_to_learn(tmp_path: Path, capsys: Any) -> None:
    assert main(["finetune-lm", "--out", str(tmp_path / "lm")]) == 2
    assert "give --data FOLDER" in capsys.readouterr().err


def test_an_existing_folder_is_refused(data: Path, taught: Path, capsys: Any) -> None:
    assert finetune(data, taught) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_no_model(data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tools.lm_training.checkpoint.save_file", full)
    assert finetune(data, tmp_path / "lm", "--steps", "3", "--checkpoint-every", "1") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "lm").exists()
    assert not (tmp_path / "lm.partial" / checkpoint.NAME).exists()
