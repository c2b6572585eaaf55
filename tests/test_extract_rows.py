"""extract: labels of spans, texts and chats, where rows come from, hook points, norms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from tqdm import tqdm

import tools.extract
from tools.cli import main
from tools.lm_training.models import build_model, build_tokenizer
from trainer.language_model import capture, load_language_model
from trainer.stream import Manifest, ShardSpec, ShardWriter
from trainer.stream.norms import RowNorms

TEXTS = ["Ada works in Oslo since May.", "Ben was born in Lima.", "Cem studied law in Rome for years."]
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last or add_generation_prompt %}|"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "lm"
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TEXTS, 280)
    tokenizer.chat_template = CHAT
    build_model("gpt2", tokenizer, layers=2, width=16, heads=2, context=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def extract(model_folder: Path, out: Path, rows: list[dict[str, Any]], *arguments: str) -> int:
    source = out.parent / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    common = ["--model", str(model_folder), "--out", str(out), "--dtype", "float32", "--device", "cpu"]
    return main(["extract", *common, "--prompts", str(source), *arguments])


def columns(folder: Path) -> dict[str, list[np.ndarray]]:
    """All rows of a split, read by stock webdataset; labels of blocks of different width padded to lists."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    blocks = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    return {name: [row for b in blocks for row in b[f"{name}.npy"]] for name in ("acts", "concept", "answer", "token")}


def span(text: str, part: str, concept: str) -> dict[str, Any]:
    return {"start": text.index(part), "end": text.index(part) + len(part), "concept": concept}


def test_the_bar_moves_within_a_unit(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            moved.append(n)
            return super().update(n)

    moved: list[float | None] = []
    monkeypatch.setattr(tools.extract, "tqdm", Bar)
    rows = [{"text": text, "concepts": ["place"]} for text in TEXTS]
    assert extract(model_folder, tmp_path / "out", rows, "--layers", "1", "--batch-size", "1") == 0
    assert [n for n in moved if n] == [1, 1, 1]


@pytest.mark.parametrize(("outside", "other"), [("none", -2), ("unknown", -1)])
def test_tokens_that_overlap_a_span_carry_its_concept(
    model_folder: Path, tmp_path: Path, outside: str, other: int
) -> None:
    rows: list[dict[str, Any]] = [
        {"text": TEXTS[0], "spans": [span(TEXTS[0], "Oslo", "place"), span(TEXTS[0], "May", "time")]},
        {"text": TEXTS[1], "spans": []},
        {"text": TEXTS[2]},
    ]
    arguments = ["--layers", "1", "--context", "7", "--outside", outside]
    assert extract(model_folder, tmp_path / "out", rows, *arguments) == 0
    found, manifest = columns(tmp_path / "out/layer-01/train"), Manifest.load(tmp_path / "out/layer-01/train")
    assert manifest.concepts == ["place", "time"]
    _, tokenizer = load_language_model(model_folder)
    expected = []
    for text, labelled in zip(TEXTS, (True, True, False), strict=True):
        for start, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]:
            label = other if labelled else -1
            for index, (part, home) in enumerate((("Oslo", 0), ("May", 0))):
                at = TEXTS[home].index(part)
                if text == TEXTS[home] and start < at + len(part) and at < end:
                    label = index
            expected.append(label)
    assert np.array(found["concept"]).reshape(len(expected), -1)[:, 0].tolist() == expected
    assert {0, 1, other, -1} <= set(expected)


def test_every_row_says_which_token_it_is(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "concept": "c", "split": split} for text in TEXTS for split in ("train", "heldout")]
    arguments = ["--layers", "0", "--context", "5", "--skip-first", "2", "--rows-per-block", "4", "--batch-size", "2"]
    assert extract(model_folder, tmp_path / "out", rows, *arguments) == 0
    model, tokenizer = load_language_model(model_folder)
    for split, first in (("train", 0), ("heldout", 1)):
        found = columns(tmp_path / "out/layer-00" / split)
        encoded = {index: tokenizer(rows[index]["text"])["input_ids"] for index in range(first, 6, 2)}
        wanted = [(ids[p], index, p) for index, ids in encoded.items() for p in range(len(ids)) if p % 5 >= 2]
        assert np.array(found["token"]).tolist() == [list(row) for row in wanted]
        assert found["token"][0].dtype == np.int32
        for acts, (_, index, place) in zip(found["acts"], wanted, strict=True):
            window = torch.tensor([encoded[index][place // 5 * 5 : place + 1]])
            one = capture(model, window, torch.ones_like(window), [0])[0][0, -1]
            np.testing.assert_allclose(acts, one.numpy(), atol=1e-5, rtol=1e-4)
        assert main(["verify", str(tmp_path / "out/layer-00" / split)]) == 0


def test_labels_of_prompts_chats_and_texts(model_folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Where?", "concept": "city", "answer": "Oslo"},
        {"messages": [{"role": "user", "content": "Where?"}], "concept": "place"},
        {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Oslo"}]},
        {"prompt": "Who?", "concepts": [], "answer": None},
        {"text": "Rome", "concept": "city", "answer": "Rome"},
    ]
    assert extract(model_folder, tmp_path / "out", rows, "--layers", "1") == 0
    found, manifest = columns(tmp_path / "out/layer-01/train"), Manifest.load(tmp_path / "out/layer-01/train")
    _, tokenizer = load_language_model(model_folder)
    texts = ["Where?", "user: Where?|assistant:", "user: Where?|assistant: Oslo", "Who?"]
    ends = [(ids[-1], index, len(ids) - 1) for index, ids in enumerate(tokenizer(texts)["input_ids"])]
    rome = [(token, 4, place) for place, token in enumerate(tokenizer("Rome")["input_ids"])]
    assert [tuple(row) for row in np.array(found["token"]).tolist()] == ends + rome
    assert (manifest.concepts, manifest.answers) == (["city", "place"], ["Oslo", "Rome"])
    assert manifest.extra["token_position"] == "every token of a text; last prompt token"
    labels = np.array(found["concept"]).reshape(len(ends + rome), -1)[:, 0].tolist()
    assert labels == [0, 1, -1, -2, *[0] * len(rome)]
    assert np.array(found["answer"]).tolist() == [0, -1, -1, -1, *[1] * len(rome)]


def test_several_concepts_of_a_row(model_folder: Path, tmp_path: Path) -> None:
    both = [span(TEXTS[0], "Oslo", "city"), span(TEXTS[0], "in Oslo", "place")]
    rows: list[dict[str, Any]] = [{"text": TEXTS[0], "spans": both}, {"prompt": "x", "concepts": ["place", "time"]}]
    assert extract(model_folder, tmp_path / "out", rows, "--layers", "1", "--concepts", "place,city") == 0
    folder = tmp_path / "out/layer-01/train"
    labels = [tuple(row[row != -1].tolist()) for row in columns(folder)["concept"]]
    assert Manifest.load(folder).concepts_per_row == 2
    assert labels[-1] == (0,)  # nothing is known of a concept that is left out
    assert {(-2,), (0,), (0, 1)} == {tuple(sorted(label)) for label in labels[:-1]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "abc", "spans": [{"start": 2, "end": 4, "concept": "c"}]}, ":1: span 2..4 of 'c'"),
        ({"text": "abc", "spans": [{"start": 1, "end": 1, "concept": "c"}]}, "is empty or ends outside"),
        ({"text": "abc", "spans": [{"start": 1, "end": 2}]}, "no field 'concept' in spans[0]"),
        ({"text": "abc", "spans": [], "concept": "c"}, "exclude each other"),
        ({"text": " "}, "text is empty"),
        ({"prompt": "abc", "spans": []}, "spans belong to a text"),
        ({"messages": "hi"}, "messages='hi'"),
        ({"messages": []}, "messages is empty"),
        ({"concept": "c"}, "no field 'prompt', 'text' or 'messages'"),
    ],
)
def test_impossible_rows_are_one_line(
    model_folder: Path, tmp_path: Path, capsys: Any, row: dict[str, Any], message: str
) -> None:
    assert extract(model_folder, tmp_path / "out", [row], "--layers", "0") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("alignsae: error: ") and message in error and "rows.jsonl" in error
    assert not (tmp_path / "out").exists()


def test_hook_points_by_name(model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"text": text} for text in TEXTS]
    hooks = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out", "transformer.h.0.mlp.c_fc"]
    assert extract(model_folder, tmp_path / "out", rows, "--hooks", ",".join(hooks)) == 0
    folders = [tmp_path / "out" / name / "train" for name in ("layer-01", *hooks[1:])]
    assert [Manifest.load(folder).hook_point for folder in folders] == hooks
    assert [Manifest.load(folder).width for folder in folders] == [16, 16, 64]
    assert Manifest.load(folders[0]).extra["token_position"] == "every token of a text"
    assert extract(model_folder, tmp_path / "out", rows, "--hooks", "layer-06") == 2
    assert extract(model_folder, tmp_path / "out", rows) == 2
    assert "give --layers 6 or --hooks" in capsys.readouterr().err.splitlines()[-1]


def test_rows_of_giant_norm_are_reported(model_folder: Path, tmp_path: Path, caplog: Any) -> None:
    model, tokenizer = load_language_model(model_folder)
    giant = tokenizer("May")["input_ids"][0]
    model.get_input_embeddings().weight[giant] *= 1000
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    rows = [{"text": text * 3} for text in TEXTS]
    for name, warned in ((model_folder, False), (tmp_path / "lm", True)):
        assert extract(name, tmp_path / f"out-{warned}", rows, "--layers", "1", "--context", "32") == 0
        assert ("of the variance; mean and scale leave them out" in caplog.text) == warned
        found = np.array(columns(tmp_path / f"out-{warned}/layer-01/train")["acts"]).astype(np.float64)
        norms = np.linalg.norm(found, axis=1)
        manifest = Manifest.load(tmp_path / f"out-{warned}/layer-01/train")
        stored = manifest.extra["norms"]
        assert manifest.median_norm == stored["median"]
        assert stored["largest"] == pytest.approx(norms.max(), rel=1e-5)
        assert stored["median"] == pytest.approx(np.median(norms), rel=0.05)
        above = norms > 10 * np.median(norms)
        assert stored["giant_rows"] == above.sum() and bool(above.any()) == warned
        variance = ((found - found.mean(axis=0)) ** 2).sum(axis=1)
        few = found[~above]
        np.testing.assert_allclose(manifest.scale**2, ((few - few.mean(axis=0)) ** 2).sum(axis=1).mean(), rtol=1e-6)
        assert stored["giant_variance"] == pytest.approx(variance[above].sum() / variance.sum(), abs=1e-6)


def test_norms_of_parts_are_those_of_the_whole() -> None:
    rows = np.random.default_rng(0).lognormal(size=(500, 8))
    whole, parts = RowNorms(8), RowNorms(8)
    whole.add(rows)
    for low in range(0, 500, 90):
        part = RowNorms(8)
        part.add(rows[low : low + 90])
        parts.merge(part)
    assert parts.report(10) == pytest.approx(whole.report(10))
    assert whole.quantile(0.99) == pytest.approx(np.quantile(np.linalg.norm(rows, axis=1), 0.99), rel=0.05)


def test_an_origin_of_another_shape_is_found(tmp_path: Path, capsys: Any) -> None:
    spec = ShardSpec(width=4, dtype="float32", concepts=[], answers=[])
    none, token = np.full(6, -1), np.zeros((6, 3), np.int32)
    with ShardWriter(tmp_path, "train", spec) as writer:
        writer.write(torch.randn(6, 4), none, none, token)
    assert main(["verify", str(tmp_path)]) == 0
    path = next(tmp_path.glob("*.tar"))
    path.write_bytes(path.read_bytes().replace(b"'shape': (6, 3), }", b"'shape': (9, 2), }"))
    assert main(["verify", str(tmp_path)]) == 2
    assert "token.npy is int32 (9, 2), not integers (6, 3)" in capsys.readouterr().out
