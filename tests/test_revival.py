"""Dead slots come back without a shock, each in a direction of its own."""

import pytest
import torch

from trainer import revival
from trainer.dictionary import GATES, ConceptDictionary, DictionaryConfig
from trainer.losses import LossWeights
from trainer.objective import AlignObjective
from trainer.optimizer import OptimConfig
from trainer.revival import RevivalConfig
from trainer.strategies.local import LocalStrategy
from trainer.sums import MicroBatch
from trainer.topology import Topology

WIDTH, SLOTS, ROWS = 16, 60, 400


def trained(steps: int = 30, gate: str = "relu") -> tuple[LocalStrategy, torch.Tensor]:
    """A strategy whose dictionary has taken some steps, then had the first 20 slots of its first bank silenced; and
    rows."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(ROWS, 40, generator=generator) < 0.1) * torch.rand(ROWS, 40, generator=generator)
    rows = codes @ torch.randn(40, WIDTH, generator=generator)
    dictionary = ConceptDictionary(DictionaryConfig(SLOTS, 32, gate=gate).form(WIDTH))
    dictionary.set_normalisation(rows.mean(dim=0).tolist(), float(rows.norm(dim=1).square().mean().sqrt()))
    strategy = LocalStrategy(Topology())
    strategy.prepare(AlignObjective(dictionary, Topology(), kernel="dense"), OptimConfig(), 0)
    for step in range(1, steps + 1):
        take_step(strategy, rows, step)
    with torch.no_grad():
        bank = next(dictionary.free_banks())
        bank.b_enc[:20] = -1e3
        bank.last_fired[:20] = 0
    return strategy, rows


def take_step(strategy: LocalStrategy, rows: torch.Tensor, step: int) -> float:
    """One step on all rows; the loss."""
    none = torch.full((len(rows),), -1)
    counts = torch.tensor([float(len(rows)), 0.0, 0.0])
    loss, _ = strategy.forward(MicroBatch(rows, none[:, None], none, counts), LossWeights(sp=0.01), False, step)
    strategy.backward(loss, last=True)
    strategy.update(3e-3, 1.0, torch.tensor(True))
    return float(loss.detach())


def revived(strategy: LocalStrategy, rows: torch.Tensor, step: int = 31) -> int:
    return revival.resample(strategy, rows, False, step, dead_after=10, seed=0)


@pytest.mark.parametrize("gate", GATES)
def test_revived_slots_differ_and_fire_on_few_rows(gate):
    strategy, rows = trained(gate=gate)
    assert revived(strategy, rows) == 20
    bank = next(strategy.objective.dictionary.free_banks())
    directions = bank.W_dec.detach()[:20]
    assert len(torch.unique(directions, dim=0)) == 20
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(20))
    with torch.no_grad():
        active = (bank.encode(strategy.objective.dictionary.normalise(rows)) > 0)[:, :20].sum(dim=0)
    assert active.min() >= 1 and active.max() <= 2 * round(revival.FIRING * ROWS)
    state = strategy.read("bank-00000", everywhere=True)
    assert state is not None
    for name, second in state.exp_avg_sq.items():
        torch.testing.assert_close(second[:20], second[20:].mean(dim=0).expand_as(second[:20]), msg=name)
        assert not state.exp_avg[name][:20].any()


@pytest.mark.parametrize("gate", GATES)
def test_reconstruction_is_not_shaken(gate):
    strategy, rows = trained(gate=gate)
    x, before, *_ = strategy.objective.look(rows, False)
    revived(strategy, rows)
    _, after, *_ = strategy.objective.look(rows, False)
    assert (x - after).square().sum() <= 1.05 * (x - before).square().sum()
    losses = [take_step(strategy, rows, step) for step in range(32, 60)]
    assert max(losses) <= 1.2 * losses[0]


def test_no_more_slots_come_back_than_can_fire_together():
    """Rows that lack the same make new slots that lie along each other; above a threshold each adds that at least."""
    strategy, rows = trained(gate="batch_topk")
    rows = rows + 20.0 * torch.nn.functional.one_hot(torch.tensor(3), WIDTH)
    for bank in strategy.objective.dictionary.free_banks():
        bank.get_buffer("theta").fill_(1.0)
    x, before, *_ = strategy.objective.look(rows, False)
    assert 0 < revived(strategy, rows) < 20
    _, after, *_ = strategy.objective.look(rows, False)
    assert (x - after).square().sum() < (x - before).square().sum()


def test_equal_rows_give_one_slot():
    strategy, rows = trained()
    same = rows[:1].expand(50, -1).contiguous()
    assert revived(strategy, same) == 1


def test_fewer_rows_than_dead_slots_revive_as_many_as_there_are():
    strategy, rows = trained()
    assert revived(strategy, rows[:7]) == 7


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_of_no_rows_revives_nothing(rows):
    strategy, data = trained()
    assert revived(strategy, data[:rows]) == rows


def test_rows_without_a_residual_revive_nothing():
    strategy, _ = trained()
    mean = strategy.objective.dictionary.mean
    with torch.no_grad():
        for bank in strategy.objective.dictionary.free_banks():
            bank.b_enc.fill_(-1e3)
        strategy.objective.dictionary.output.b_dec.zero_()
    assert revived(strategy, mean.expand(9, -1).contiguous()) == 0


def test_periods_scale_with_the_run():
    config = RevivalConfig()
    assert config.period(5000) == 100 and config.patience(5000) == 100 and config.period(10) == 25
    assert [s for s in range(2000) if config.due(s, 2000)][:2] == [40, 80]
    assert RevivalConfig(every=7).patience(1000) == 7
