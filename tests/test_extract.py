"""extract: rows against one prompt at a time, labels and order, texts, bad input, nothing half-written."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from tools.cli import main
from tools.lm_training.models import build_model, build_tokenizer
from trainer.language_model import SPLITS, capture, encode_prompts, load_language_model, read_prompts
from trainer.stream import Manifest

TEXTS = ["Ada works in Oslo.", "Ben was born.", "Cem studied law in Lima and in Rome for years.", "Dan."]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "lm"
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TEXTS, 270)
    model = build_model("gpt2", tokenizer, layers=3, width=16, heads=2, context=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 prompts of very different lengths, three concepts, every third one held out."""
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rows = [
        {
            "prompt": f"Q: {'who ' * (1 + i * 7 % 11)}{i}?\nA:",
            "answer": f"a{i % 5}",
            "concept": ["city", "major", "work"][i % 3 if i else 2],
            "split": "heldout" if i % 3 == 1 and i % 2 else "train",
        }
        for i in range(37)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def extract(model_folder: Path, out: Path, *arguments: str) -> int:
    common = ["--model", str(model_folder), "--out", str(out), "--dtype", "float32", "--device", "cpu"]
    return main(["extract", *common, *arguments])


def samples(folder: Path) -> dict[str, np.ndarray]:
    """All rows of a split, read by stock webdataset from the tars alone."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    blocks = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    return {name: np.concatenate([b[f"{name}.npy"] for b in blocks]) for name in ("acts", "concept", "answer")}


@pytest.mark.parametrize("batch_size", ["1", "5", "64"])
def test_rows_equal_one_prompt_at_a_time(model_folder: Path, prompts: Path, tmp_path: Path, batch_size: str) -> None:
    arguments = ["--prompts", str(prompts), "--layers", "2,0", "--batch-size", batch_size, "--rows-per-block", "4"]
    assert extract(model_folder, tmp_path, *arguments) == 0
    model, tokenizer = load_language_model(model_folder)
    records = read_prompts(prompts)
    concepts, answers = ["work", "major", "city"], [f"a{i}" for i in range(5)]
    for layer in (0, 2):
        for split in ("train", "heldout"):
            folder = tmp_path / f"layer-{layer:02d}" / split
            found, manifest = samples(folder), Manifest.load(folder)
            chosen = [r for r in records if r.split == split]
            one = [capture(model, *encode_prompts(tokenizer, [r.prompt]), [layer])[layer][0, -1] for r in chosen]
            np.testing.assert_allclose(found["acts"], torch.stack(one).numpy(), atol=2e-5, rtol=1e-4)
            assert found["concept"].tolist() == [concepts.index(r.concept) for r in chosen]
            assert found["answer"].tolist() == [answers.index(r.answer) for r in chosen]
            assert (manifest.concepts, manifest.answers) == (concepts, answers)
            assert manifest.hook_point == f"blocks.{layer}.hook_resid_post"
            assert (manifest.width, manifest.rows) == (16, len(chosen))
    assert {p.name for p in tmp_path.iterdir()} == {"layer-00", "layer-02"}


def test_several_layers_take_one_pass_and_no_later_block_runs(
    model_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    runs: list[int] = []
    forward = GPT2Block.forward

    def counted(self, *args, **options):
        runs.append(id(self))
        return forward(self, *args, **options)

    monkeypatch.setattr(GPT2Block, "forward", counted)
    assert extract(model_folder, tmp_path, "--prompts", str(prompts), "--layers", "0,1") == 0
    assert len(runs) == 2 * 2 and len(set(runs)) == 2  # two splits of one batch each, two blocks of three


def test_other_splits_are_normalised_like_the_training_split(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(prompts.read_text() + '{"prompt": "Q: where?", "concept": "city", "split": "validation"}\n')
    assert extract(model_folder, tmp_path, "--prompts", str(path), "--layers", "1") == 0
    train, validation, heldout = (Manifest.load(tmp_path / "layer-01" / split) for split in SPLITS)
    assert validation.rows == 1 and heldout.rows < train.rows < 37
    assert (validation.mean, validation.scale) == (train.mean, train.scale)
    acts = samples(tmp_path / "layer-01/train")["acts"].astype(np.float64)
    np.testing.assert_allclose(train.mean, acts.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(train.scale**2, ((acts - acts.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert (heldout.mean, heldout.scale) == (train.mean, train.scale)


def test_chosen_concepts_give_the_slot_order_and_leave_the_rest_unlabelled(
    model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    assert extract(model_folder, tmp_path, "--prompts", str(prompts), "--layers", "0", "--concepts", "city,work") == 0
    found, manifest = samples(tmp_path / "layer-00/train"), Manifest.load(tmp_path / "layer-00/train")
    chosen = [r for r in read_prompts(prompts) if r.split == "train"]
    assert manifest.concepts == ["city", "work"]
    assert found["concept"].tolist() == [{"city": 0, "work": 1}.get(r.concept, -1) for r in chosen]
    assert [a == -1 for a in found["answer"]] == [r.concept == "major" for r in chosen]


@pytest.mark.parametrize(("skip", "special"), [(0, False), (2, False), (0, True)])
def test_every_token_of_a_text_is_a_row(
    model_folder: Path, texts: Path, tmp_path: Path, skip: int, special: bool
) -> None:
    arguments = ["--texts", str(texts), "--layers", "1", "--context", "6", "--batch-size", "3"]
    arguments += ["--skip-first", str(skip)] if skip else []
    assert extract(model_folder, tmp_path, *arguments, *(["--drop-special"] if special else [])) == 0
    model, tokenizer = load_language_model(model_folder)
    expected = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 6):
            window = torch.tensor([ids[start : start + 6]])
            expected.append(capture(model, window, torch.ones_like(window), [1])[1][0, skip:])
    found = samples(tmp_path / "layer-01/train")
    np.testing.assert_allclose(found["acts"], torch.cat(expected).numpy(), atol=2e-5, rtol=1e-4)
    assert set(found["concept"]) == set(found["answer"]) == {-1}
    assert not (tmp_path / "layer-01/heldout").exists()


def test_special_tokens_and_held_out_texts(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"body": f"ab {i}<|endoftext|>cd"}) + "\n" for i in range(6)))
    arguments = ["--texts", str(path), "--field", "body", "--layers", "0", "--heldout", "3"]
    assert extract(model_folder, tmp_path / "all", *arguments) == 0
    assert extract(model_folder, tmp_path / "some", *arguments, "--drop-special") == 0
    rows = {
        (name, split): Manifest.load(tmp_path / name / "layer-00" / split).rows
        for name in ("all", "some")
        for split in ("train", "heldout")
    }
    assert rows["all", "train"] == 2 * rows["all", "heldout"]
    assert rows["all", "train"] - rows["some", "train"] == 4
    assert rows["all", "heldout"] - rows["some", "heldout"] == 2


def test_bf16_compute_and_storage(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ["--prompts", str(prompts), "--layers", "1"]
    assert extract(model_folder, tmp_path / "a", *arguments) == 0
    assert extract(model_folder, tmp_path / "b", *arguments, "--precision", "bf16", "--dtype", "bfloat16") == 0
    exact = torch.from_numpy(samples(tmp_path / "a/layer-01/train")["acts"])
    coarse = torch.from_numpy(samples(tmp_path / "b/layer-01/train")["acts"]).view(torch.bfloat16).float()
    assert 0 < (exact - coarse).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "3"], "layer 3 does not exist: the model has layers 0 to 2"),
        (["--layers", "-1"], "layer -1 does not exist"),
        (["--layers", "a"], "--layers 'a'"),
        (["--layers", "0", "--concepts", "city,jobb"], "no prompt has concept 'jobb'"),
        (["--layers", "0", "--concepts", "city,city"], "occurs twice"),
        (["--layers", "0", "--batch-size", "0"], "--batch-size 0"),
        (["--layers", "0", "--skip-first", "-1"], "--skip-first -1"),
        (["--layers", "0", "--model", "/no/such"], "cannot load a language model from '/no/such'"),
        (["--layers", "0", "--prompts", "none.jsonl"], "cannot read none.jsonl"),
    ],
)
def test_bad_arguments_are_one_line(
    model_folder: Path, prompts: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    assert extract(model_folder, tmp_path / "out", "--prompts", str(prompts), *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("alignsae: error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": " "}, "answer is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"concept": " "}, "concept is empty"),
        ({"prompt": None}, "no field 'prompt', 'text' or 'messages'; found answer, concept, prompt"),
        ({"concepts": ["c"]}, "exclude each other"),
        ({"split": "heldout"}, "no row of split 'train'"),
        ({"prompt": "ab " * 90}, "the model takes 64"),
    ],
)
def test_bad_prompts_are_one_line(
    model_folder: Path, tmp_path: Path, capsys: Any, row: dict[str, Any], message: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Q: a\nA:", "answer": "b", "concept": "c", **row}) + "\n")
    assert extract(model_folder, tmp_path / "out", "--prompts", str(path), "--layers", "0") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and "p.jsonl" in error
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_missing_field_of_texts_is_named(model_folder: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    assert extract(model_folder, tmp_path / "out", "--texts", str(texts), "--field", "body", "--layers", "0") == 2
    assert "no text field 'body'; found text" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_full_disk_leaves_nothing_under_a_final_name(
    model_folder: Path, prompts: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert extract(model_folder, tmp_path / "out", "--prompts", str(prompts), "--layers", "0,1") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_rerun_keeps_what_is_finished_and_makes_the_rest(
    model_folder: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["--prompts", str(prompts), "--layers"]
    assert extract(model_folder, tmp_path, *arguments, "0") == 0
    kept = (tmp_path / "layer-00/train/manifest.json").stat().st_mtime_ns
    assert extract(model_folder, tmp_path, *arguments, "0,1") == 0
    assert capsys.readouterr().out.count("kept") == 2
    assert (tmp_path / "layer-00/train/manifest.json").stat().st_mtime_ns == kept
    assert extract(model_folder, tmp_path / "one", *arguments, "1") == 0
    for split in ("train", "heldout"):
        there, alone = (Manifest.load(folder / "layer-01" / split) for folder in (tmp_path, tmp_path / "one"))
        assert there.digest == alone.digest


def test_another_extraction_is_not_overwritten_unless_told_so(
    model_folder: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["--prompts", str(prompts), "--layers", "0"]
    assert extract(model_folder, tmp_path / "out", *arguments) == 0
    other = tmp_path / "other"
    model, tokenizer = load_language_model(model_folder)
    model.get_input_embeddings().weight.add_(0.01)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    before = Manifest.load(tmp_path / "out/layer-00/train").digest
    assert extract(other, tmp_path / "out", *arguments) == 2
    assert "another weights" in capsys.readouterr().err
    assert extract(model_folder, tmp_path / "out", *arguments, "--concepts", "city") == 2
    assert "another concepts: choose another --out or pass --overwrite" in capsys.readouterr().err
    assert Manifest.load(tmp_path / "out/layer-00/train").digest == before
    assert extract(other, tmp_path / "out", *arguments, "--overwrite") == 0
    assert Manifest.load(tmp_path / "out/layer-00/train").digest != before
