"""Concept slots are silent where their concept is not: independent binding with negatives, on planted rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import train_here
from trainer.analysis.evaluation import evaluate_split
from trainer.analysis.results import rows_of
from trainer.checkpoint import load_dictionary
from trainer.stream import ShardSpec, ShardWriter

WIDTH, NAMES, PARTS = 96, [f"concept-{i}" for i in range(4)], 60
LABELLED, TEXT = 1000, 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and held-out shards: sparse sums of directions; labelled rows hold one or two concepts' directions too,
    text says nothing and holds none, but a direction of its own that is near the first concept's."""
    generator = torch.Generator().manual_seed(4)
    parts = torch.nn.functional.normalize(torch.randn(PARTS, WIDTH, generator=generator), dim=1)
    own = torch.nn.functional.normalize(torch.randn(len(NAMES), WIDTH, generator=generator), dim=1)

    near = torch.nn.functional.normalize(own[0] + parts[0], dim=0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def rows() -> tuple[torch.Tensor, torch.Tensor]:
        n = LABELLED + TEXT
        acts = ((uniform(n, PARTS) < 0.04) * (0.5 + uniform(n, PARTS))) @ parts
        first = torch.randint(len(NAMES), (n,), generator=generator)
        second = torch.where(uniform(n) < 0.3, (first + 1) % len(NAMES), -1)
        concept = torch.stack([first, second], dim=1)
        concept[LABELLED:] = -1
        held = (torch.nn.functional.one_hot(concept + 1, len(NAMES) + 1).sum(dim=1) > 0)[:, 1:]
        acts[LABELLED:] += (0.5 + uniform(TEXT, 1)) * near
        order = torch.randperm(n, generator=generator)
        return (acts + held * (1.0 + uniform(n, len(NAMES))) @ own)[order], concept[order]

    place, usual = tmp_path_factory.mktemp("planted"), None
    for split in ("train", "heldout"):
        spec = ShardSpec(width=WIDTH, dtype="float32", concepts=NAMES, answers=[])
        with ShardWriter(place / split, split, spec, rows_per_block=200, normalisation=usual) as writer:
            acts, concept = rows()
            writer.write(acts, concept, torch.full((len(acts),), -1))
            manifest = writer.close()
        usual = (manifest.mean, manifest.scale)
    return place


@pytest.fixture(scope="module")
def figures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Held-out figures of a run without negatives and of one with them."""

    def trained() -> Iterator[tuple[str, dict[str, Any]]]:
        forms = {"softmax": [], "sigmoid": ["loss.binding=sigmoid", "data.unlabelled=none", "loss.sp_concept=0.01"]}
        changes = {
            "run": {"log_every": 50},
            "data": {"global_batch": 160, "window": 4},
            "dictionary": {"free_slots": 64, "bank_slots": 64},
            "stages": [{"name": "pretrain", "steps": 40}, {"name": "align", "steps": 160}],
            "optim": {"lr": 0.01},
            "revival": {"method": "none"},
            "checkpoint": {"every": 0},
        }
        for name, overrides in forms.items():
            place = tmp_path_factory.mktemp(name)
            assert train_here(place, folder / "train", *overrides, changes=changes) == 0
            dictionary, _ = load_dictionary(place / "run")
            rows, sources = rows_of([str(folder / "heldout")], dictionary)
            yield name, evaluate_split(dictionary, rows, sources.manifest.concepts)

    return dict(trained())


@pytest.mark.slow
def test_slots_are_silent_on_text(figures: dict[str, dict[str, Any]]) -> None:
    without, found = figures["softmax"]["text"], figures["sigmoid"]["text"]
    assert found["rows"] == TEXT
    assert found["concept_firing_rate"] <= 0.01 < 0.1 < without["concept_firing_rate"]
    assert found["auroc"] >= 0.99


@pytest.mark.slow
def test_slots_know_their_concepts_as_well_as_without_negatives(figures: dict[str, dict[str, Any]]) -> None:
    assert figures["sigmoid"]["binding"]["slot_accuracy"] >= figures["softmax"]["binding"]["slot_accuracy"] - 0.005
    assert figures["sigmoid"]["binding"]["slots_alive"] == len(NAMES)
    assert figures["sigmoid"]["labels"]["mean_average_precision"] >= 0.99
