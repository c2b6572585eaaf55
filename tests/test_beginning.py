"""Free slots that begin along rows of the data: each in a direction of its own, active on few rows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support.data import write_data
from tests.support.runs import assert_same, tensors, train_here
from trainer.beginning import begin_along_rows
from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.errors import UserError
from trainer.objective import AlignObjective
from trainer.optimizer import OptimConfig
from trainer.strategies.local import LocalStrategy
from trainer.stream import Batch
from trainer.topology import Topology

WIDTH, SLOTS, ROWS = 16, 60, 40


def batches(rows: torch.Tensor, valid: torch.Tensor) -> Iterator[Batch]:
    """The same batch for ever."""
    none = torch.full((len(rows),), -1)
    while True:
        yield Batch(
            acts=rows,
            concept=none[:, None],
            answer=none,
            valid=valid,
            outlier=~valid,
            row_ids=none,
            positions=none,
            step=0,
        )


def begun(rows: torch.Tensor, valid: torch.Tensor) -> tuple[ConceptDictionary, ConceptDictionary]:
    """A dictionary before and after."""
    dictionary, untouched = (
        ConceptDictionary(DictionaryConfig(SLOTS, 32).form(WIDTH), initial_norm=0.3) for _ in range(2)
    )
    strategy = LocalStrategy(Topology())
    strategy.prepare(AlignObjective(dictionary, Topology(), kernel="dense"), OptimConfig(), 0)
    begin_along_rows(strategy, batches(rows, valid), firing=0.1)
    return untouched, dictionary


def test_slots_turn_towards_rows_and_keep_their_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, valid = torch.randn(ROWS, WIDTH, generator=generator), torch.arange(ROWS) % 8 > 0
    before, after = begun(rows, valid)
    first, old = next(after.free_banks()), next(before.free_banks())
    directions = F.normalize(rows[valid][:32], dim=1)
    for name in ("W_enc", "W_dec"):
        new, was = getattr(first, name).detach(), getattr(old, name).detach()
        torch.testing.assert_close(new.norm(dim=1), torch.full((32,), 0.3))
        towards = F.cosine_similarity(new, directions, dim=1)
        assert towards.min() > 0.7 and (towards > F.cosine_similarity(was, directions, dim=1)).all()
    with torch.no_grad():
        active = (first.encode(rows[valid]) > 0).sum(dim=0)
    assert active.min() >= 1 and active.max() <= 2 * round(0.1 * int(valid.sum()))


def test_equal_rows_make_no_equal_slots() -> None:
    """Fewer rows than slots, and all of them the same one."""
    _, after = begun(torch.ones(ROWS, WIDTH), torch.ones(ROWS, dtype=torch.bool))
    directions = torch.cat([bank.W_dec.detach() for bank in after.free_banks()])
    assert len(torch.unique(directions, dim=0)) == SLOTS


def test_rows_that_lack_everything_leave_the_slots_as_they_are() -> None:
    before, after = begun(torch.zeros(ROWS, WIDTH), torch.ones(ROWS, dtype=torch.bool))
    for ours, theirs in zip(after.free_banks(), before.free_banks(), strict=True):
        assert torch.equal(ours.W_dec, theirs.W_dec)


def test_a_run_begins_along_its_rows_once(tmp_path: Path) -> None:
    """A run that resumes goes on as an undisturbed one."""
    data = write_data(tmp_path / "data")
    settings = ("dictionary.begin=rows", "revival.method=none")
    assert train_here(tmp_path / "whole", data, *settings, "checkpoint.keep=9") == 0
    first = tmp_path / "whole/run/checkpoints/step-00000007"
    assert train_here(tmp_path / "resumed", data, *settings, f"checkpoint.resume={first}") == 0
    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "resumed"))


def test_words_and_norms_that_cannot_be() -> None:
    for bad, message in (
        ({"begin": "row"}, "dictionary.begin='row'"),
        ({"begin": "rows", "start_from": "folder"}, "does not go with"),
        ({"initial_norm": 0.0}, "dictionary.initial_norm=0.0"),
    ):
        with pytest.raises(UserError, match=message):
            DictionaryConfig(**bad).validate()
