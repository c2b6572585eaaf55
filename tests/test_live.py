"""Rows that are computed while a dictionary trains on them, beside the shards that `alignsae extract` writes."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.language_model import save_model_of
from tests.support.ranks import Ranks, run_ranks
from tests.support.runs import digests, metrics, tensors, train_rank, write_config
from tools.cli import main
from trainer import train
from trainer.analysis.results import run_shards
from trainer.errors import UserError
from trainer.extraction.live import LiveRows
from trainer.stream import Manifest

SENTENCE = "Ada works in Oslo, Ben was born in Lima, Cem studied law. "
POINT = "blocks.1.hook_resid_post"
# Small units, of several windows each; batches that mix windows of several documents.
SETTINGS = {"context": 32, "unit_kb": 1, "batch_size": 3, "heldout": 5}
STAGES = [{"name": "pretrain", "steps": 60}, {"name": "align", "steps": 40}]
CHANGES: dict[str, Any] = {
    "data": {"global_batch": 32, "lanes": 2, "window": 2, "threads": 1},
    "stages": STAGES,
    "checkpoint": {"every": 30, "keep": 9},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, texts, and labelled rows of spans."""
    folder = tmp_path_factory.mktemp("live")
    save_model_of([SENTENCE], folder / "lm")
    texts = [SENTENCE[i % 7 :] * (1 + i * 7 % 5) for i in range(60)]
    spans = [{"start": 0, "end": 3, "concept": "person"}, {"start": 13, "end": 17, "concept": "place"}]
    write(folder / "texts.jsonl", [{"text": text} for text in texts])
    write(folder / "rows.jsonl", [{"text": SENTENCE * (1 + i % 3), "spans": spans} for i in range(60)])
    return folder


@pytest.fixture(scope="module")
def shards(inputs: Path) -> Path:
    """What extract writes of the labelled rows."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    source = ["--model", str(inputs / "lm"), "--prompts", str(inputs / "rows.jsonl"), "--hooks", POINT]
    assert main(["extract", *source, *options, "--device", "cpu", "--out", str(inputs / "shards")]) == 0
    return inputs / "shards" / "layer-01" / "train"


@pytest.fixture(scope="module")
def from_shards(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the shards."""
    folder = tmp_path_factory.mktemp("from_shards")
    assert train.main(arguments(folder, {"data.shards": shards})) == 0
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def live(inputs: Path, **changes: Any) -> dict[str, Any]:
    """Settings of the section data.live."""
    given = {"model": inputs / "lm", "prompts": inputs / "rows.jsonl", "hook": POINT, **SETTINGS, **changes}
    return {f"data.live.{name}": value for name, value in given.items() if value is not None}


def arguments(folder: Path, settings: Mapping[str, Any], *overrides: str) -> list[str]:
    """Command line of a run in folder/run."""
    given = [f"{key}={value}" for key, value in settings.items()]
    return ["--config", str(write_config(folder, CHANGES)), f"run.dir={folder / 'run'}", *given, *overrides]


def assert_same_training(one: Path, other: Path, steps: int = 100) -> None:
    """Rows by rows and loss term by loss term."""
    ours, theirs = metrics(one), metrics(other)
    assert ours.keys() == theirs.keys() and len(ours) == steps
    assert digests(one) == digests(other)
    for step, line in theirs.items():
        terms = {name: value for name, value in line.items() if name.startswith("loss") or name == "fvu"}
        assert terms == pytest.approx({name: ours[step][name] for name in terms}, rel=1e-6, abs=1e-6), step


def test_live_rows_are_those_of_the_shards(inputs, shards, from_shards, tmp_path) -> None:
    assert train.main(arguments(tmp_path, live(inputs, manifest=shards))) == 0
    assert_same_training(tmp_path, from_shards)
    for name, tensor in tensors(from_shards).items():
        assert torch.equal(tensor, tensors(tmp_path)[name]), name
    assert max(line["live_tokens_per_s"] for line in metrics(tmp_path).values()) > 0
    assert metrics(tmp_path)[100]["epoch"] > 1  # blocks are computed again


def test_a_run_makes_its_manifest_and_keeps_it(inputs, shards, tmp_path, capsys) -> None:
    """Without one it counts rows by making tokens; what it samples is measured as extract measures."""
    settings = live(inputs)
    assert train.main(arguments(tmp_path, settings)) == 0
    mine, theirs = Manifest.load(tmp_path / "run" / "live" / "rows"), Manifest.load(shards)
    assert mine.keys == theirs.keys and mine.block_rows.tolist() == theirs.block_rows.tolist()
    assert (mine.mean, mine.scale, mine.median_norm) == (theirs.mean, theirs.scale, theirs.median_norm)
    assert (mine.concepts, mine.extra["norms"]) == (theirs.concepts, theirs.extra["norms"])
    assert not mine.shards and mine.extra["sample"]["rows"] == mine.rows
    # Another run may begin with it; a smaller sample is another data set.
    again = live(inputs, manifest=tmp_path / "run" / "live" / "rows")
    assert train.main(arguments(tmp_path / "again", again)) == 0
    assert_same_training(tmp_path / "again", tmp_path)
    assert train.main(arguments(tmp_path / "few", live(inputs, sample=500), "stages=[{name: pretrain, steps: 1}]")) == 0
    few = Manifest.load(tmp_path / "few" / "run" / "live" / "rows")
    assert 500 <= few.extra["sample"]["rows"] < 1000 and few.scale == pytest.approx(mine.scale, rel=0.1)
    assert few.digest != mine.digest
    with pytest.raises(UserError, match="trained on rows that were computed"):
        run_shards(tmp_path / "run")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run" / "live" / "rows")]) == 2
    assert "is the manifest of rows that are computed" in capsys.readouterr().err


def test_a_run_that_ended_goes_on(inputs, from_shards, shards, tmp_path, monkeypatch, capsys) -> None:
    settings = live(inputs, manifest=shards)
    monkeypatch.setattr(LiveRows, "rows", counted(fail))
    assert train.main(arguments(tmp_path, settings)) == 2
    assert "error: no more" in capsys.readouterr().err and 0 < max(metrics(tmp_path)) < 100
    monkeypatch.undo()
    assert train.main(arguments(tmp_path, settings)) == 0
    assert_same_training(tmp_path, from_shards)


def fail() -> None:
    raise UserError("no more")


def counted(end: Callable[[], None]) -> Callable[..., Any]:
    """LiveRows.rows that calls `end` in its second epoch."""
    rows, count = LiveRows.rows, 0

    def counting(self: Any, index: int) -> Any:
        nonlocal count
        count += 1
        if count > 3 * len(self.manifest.keys) // 2:
            end()
        return rows(self, index)

    return counting


def dying(argv: list[str]) -> None:
    """A run that is killed in its second epoch."""
    LiveRows.rows = counted(partial(os.kill, os.getpid(), signal.SIGKILL))  # type: ignore[method-assign]
    train_rank(argv)


@pytest.mark.slow
def test_two_ranks_agree_also_after_a_kill(inputs, shards, from_shards, tmp_path) -> None:
    run_ranks(2, train_rank, arguments(tmp_path / "shards", {"data.shards": shards}))
    for name, settings in (("given", live(inputs, manifest=shards)), ("made", live(inputs))):
        argv = arguments(tmp_path / name, settings)
        with Ranks(2, dying, argv) as ranks:
            assert any(ranks.wait().codes)
        run_ranks(2, train_rank, argv)
    assert_same_training(tmp_path / "given", tmp_path / "shards")
    assert digests(tmp_path / "given") == digests(from_shards)
    assert train.main(arguments(tmp_path / "alone", live(inputs))) == 0
    assert digests(tmp_path / "made") == digests(tmp_path / "alone")


def test_a_live_source_is_mixed_with_shards(inputs, shards, tmp_path) -> None:
    corpus = {key.replace("data.", "data.sources.corpus."): value for key, value in live(inputs, prompts=None).items()}
    corpus |= {"data.sources.corpus.live.texts": inputs / "texts.jsonl", "data.sources.labelled.shards": shards}
    half = "{corpus: 0.5, labelled: 0.5}"
    stages = f"stages=[{{name: pretrain, steps: 5, mix: {{corpus: 1}}}}, {{name: align, steps: 5, mix: {half}}}]"
    assert train.main(arguments(tmp_path, corpus, stages)) == 0
    assert metrics(tmp_path)[10]["epoch/labelled"] > 0 and any("binding" in line for line in metrics(tmp_path).values())
    assert (tmp_path / "run" / "live" / "corpus" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, "cannot load a language model from './nowhere'"),
        ({"prompts": "nowhere.jsonl"}, "cannot read nowhere.jsonl"),
        ({"hook": "blocks.7.hook_resid_post"}, "data.live.hook: layer 7 does not exist"),
        ({"context": 16}, "data.live: data.live.context is 16, there it is 32"),
        ({"prompts": "OTHER"}, "holds other texts than"),
        ({"model": "OTHER"}, "has other weights than"),
        ({"texts": "x"}, "data.live: set one of texts and prompts"),
        ({"precision": "int8"}, "data.live.precision='int8' is unknown; use fp32 or bf16"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    inputs, shards, tmp_path, capsys, changes, message
) -> None:
    if changes.get("prompts") == "OTHER":
        changes = {"prompts": inputs / "other.jsonl"}
        write(inputs / "other.jsonl", [{"text": SENTENCE, "concept": "person"}])
    if changes.get("model") == "OTHER":
        changes = {"model": tmp_path / "lm"}
        shutil.copytree(inputs / "lm", tmp_path / "lm")
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
        model.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1
        model.save_pretrained(tmp_path / "lm")
    capsys.readouterr()
    assert train.main(arguments(tmp_path, live(inputs, manifest=shards, **changes))) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "dictionary"])
def test_strategies_train_on_live_rows(inputs, shards, tmp_path, strategy) -> None:
    short = "stages=[{name: pretrain, steps: 10}, {name: align, steps: 10}]"
    more = (f"parallel.strategy={strategy}", "dictionary.bank_slots=8", short)
    for name, settings in (("live", live(inputs, manifest=shards)), ("shards", {"data.shards": shards})):
        run_ranks(2, train_rank, arguments(tmp_path / name, settings, *more))
    assert_same_training(tmp_path / "live", tmp_path / "shards", steps=20)
