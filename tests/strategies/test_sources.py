"""A curriculum on two sources: the same run under every strategy, after every kill, and from every other folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.strategies.curriculum_runs import CURRICULUM, Layout
from tests.strategies.test_strategies import assert_close_runs, label
from tests.support.data import write_data
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, assert_same, digests, metrics, tensors, train_here, train_rank
from trainer.checkpoint import load_dictionary
from trainer.stream import Manifest

# Lanes of eight rows: the corpus alone, three to one, one to one. The small source repeats.
STAGES = [
    {"name": "pretrain", "steps": 15, "mix": {"corpus": 1.0}},
    {"name": "align", "steps": 8, "mix": {"corpus": 0.75, "labelled": 0.25}},
    {"name": "align", "steps": 7, "mix": {"corpus": 0.5, "labelled": 0.5}},
]
TWO_SOURCES: dict[str, Any] = {**CURRICULUM, "stages": STAGES, "checkpoint": {"every": 10, "keep": 9}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    corpus = write_data(folder / "corpus", dtype="float32", rows=360, concepts=["studied"])
    return {"corpus": corpus, "labelled": write_data(folder / "labelled", dtype="float32", rows=90)}


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    folder = tmp_path_factory.mktemp("alone")
    assert train_here(folder, sources, changes=TWO_SOURCES) == 0
    return folder


def test_what_is_kept_names_all_sources(alone: Path, sources: dict[str, Path]) -> None:
    dictionary, manifest = load_dictionary(alone / "run")
    assert dictionary.concept_names == ["studied", "born", "works"]  # in the order of sources
    corpus = Manifest.load(sources["corpus"])
    assert dictionary.scale.item() == pytest.approx(corpus.scale)  # of the first stage's first source
    digests = {name: Manifest.load(folder).digest for name, folder in sources.items()}
    assert manifest.extra["sources"] == digests
    state = json.loads((alone / "run" / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert {name: source["manifest"] for name, source in state["stream"]["sources"].items()} == digests
    last = metrics(alone)[30]
    assert last["epoch/labelled"] > 1.2 and last["epoch"] == last["epoch/corpus"] > 1.8
    assert last["loss/bind"] > 0 and last["binding"] > 0.3


@pytest.mark.parametrize("stop", [10, 20])
def test_a_run_goes_on_from_the_middle_of_an_epoch_of_each_source(alone, sources, tmp_path, stop) -> None:
    resume = alone / "run" / "checkpoints" / f"step-{stop:08d}"
    assert train_here(tmp_path, sources, f"checkpoint.resume={resume}", changes=TWO_SOURCES) == 0
    assert_same(tensors(tmp_path), tensors(alone))
    assert digests(tmp_path)[30] == digests(alone)[30]


@pytest.mark.parametrize(
    "layout",
    [
        Layout("ddp", 2),
        Layout("dictionary", 2),
        pytest.param(Layout("zero3", 2), marks=pytest.mark.slow),
        pytest.param(Layout("mesh", 4), marks=pytest.mark.slow),
    ],
    ids=label,
)
def test_strategies_agree(alone: Path, sources: dict[str, Path], tmp_path: Path, layout: Layout) -> None:
    run_ranks(layout.world, train_rank, arguments(tmp_path, sources, *layout.overrides, changes=TWO_SOURCES))
    assert_close_runs(metrics(tmp_path), metrics(alone))
    assert digests(tmp_path) == digests(alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["stages.0.mix={corpse: 1.0}"], "stages.0.mix names 'corpse', but data.sources has corpus, labelled"),
        (["stages.1.mix.labelled=0.3"], "stages.1.mix adds up to 1.05, not 1; the nearest that goes"),
        (
            ["stages.1.mix={corpus: 1, labelled: 0}", "data.sources.corpus.shards=BARE"],
            "no source of stages.1.mix names concepts",
        ),
        (["data.sources.labelled.shards=WIDE"], "data.sources.labelled has width 16, data.sources.corpus has 12"),
        (["data.shards=x"], "data.shards and data.sources are both set"),
    ],
)
def test_what_cannot_be_is_refused_before_ranks_meet(sources, tmp_path, capsys, monkeypatch, change, message) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    write_data(tmp_path / "BARE", dtype="float32", concepts=[])
    write_data(tmp_path / "WIDE", dtype="float32", width=16)
    overrides = [text.replace("BARE", f"{tmp_path}/BARE").replace("WIDE", f"{tmp_path}/WIDE") for text in change]
    assert train_here(tmp_path, sources, *overrides, changes=TWO_SOURCES) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_another_source_of_the_same_name_is_refused(alone, sources, tmp_path, capsys) -> None:
    other = {**sources, "labelled": write_data(tmp_path / "other", dtype="float32", rows=100)}
    resume = alone / "run" / "checkpoints" / "step-00000020"
    assert train_here(tmp_path, other, f"checkpoint.resume={resume}", changes=TWO_SOURCES) == 2
    assert "data.sources.labelled holds other rows than those of the saved position" in capsys.readouterr().err
    changed = ["stages.1.mix={corpus: 0.5, labelled: 0.5}", f"checkpoint.resume={resume}"]
    assert train_here(tmp_path, sources, *changed, changes=TWO_SOURCES) == 2
    assert "what is past cannot change: restore the mix" in capsys.readouterr().err
