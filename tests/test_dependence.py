"""The orthogonality term by itself, on planted rows: what it leaves alone, and what it drives apart."""

import pytest
import torch
from torch import Tensor

from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.losses import LossWeights, orthogonality
from trainer.objective import AlignObjective
from trainer.optimizer import OptimConfig
from trainer.strategies.local import LocalStrategy
from trainer.sums import MicroBatch
from trainer.topology import Topology

CONCEPTS, COPIES, INDEPENDENT, ROWS, STEPS = 4, 4, 60, 256, 1000
WIDTH = CONCEPTS + COPIES + INDEPENDENT
BIAS = -0.25
FREQUENCIES = torch.logspace(-1, -3, INDEPENDENT)  # of independent slots: 1 row in 10 to 1 in 1,000


def planted(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows [B, D] whose entry j is how active slot j is, concepts first, and their concept [B, 1].

    A concept has one row in four, each copy fires with its concept in nine rows of ten, other slots fire at random.
    """

    def strength(*shape: int) -> Tensor:
        return 0.5 + torch.rand(*shape, generator=generator)

    concept = torch.randint(CONCEPTS, (rows,), generator=generator)
    own = torch.nn.functional.one_hot(concept, CONCEPTS)
    copies = own * (torch.rand(rows, COPIES, generator=generator) < 0.9)
    others = torch.rand(rows, INDEPENDENT, generator=generator) < FREQUENCIES
    return torch.cat([own, copies, others], dim=1) * strength(rows, WIDTH), concept[:, None]


def dictionary() -> ConceptDictionary:
    """Every slot reads and writes its own entry of a row, and is well below its threshold where that entry is 0."""
    made = ConceptDictionary(DictionaryConfig(COPIES + INDEPENDENT, 40).form(WIDTH, [f"c{i}" for i in range(CONCEPTS)]))
    directions = torch.eye(WIDTH).split([CONCEPTS, *made.form.bank_sizes])
    with torch.no_grad():
        for bank, own in zip(made.all_banks(), directions, strict=True):
            bank.W_enc.copy_(own)
            bank.W_dec.copy_(own)
            bank.b_enc.fill_(BIAS)
    return made


@torch.no_grad()
def codes(made: ConceptDictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of concept slots [B, R] and of free slots [B, K]."""
    return made.concepts.encode(x), torch.cat([bank.encode(x) for bank in made.free_banks()], dim=1)


@pytest.mark.slow
def test_slots_that_are_independent_are_left_alone_and_copies_lose_their_correlation() -> None:
    made, generator = dictionary(), torch.Generator().manual_seed(0)
    x, _ = planted(50_000, torch.Generator().manual_seed(1))
    concept_code, before = codes(made, x)
    assert float(orthogonality(concept_code, before[:, :COPIES])) > COPIES / 2
    strategy, config = LocalStrategy(Topology()), OptimConfig()
    objective = AlignObjective(made, strategy.topology, kernel="dense")
    strategy.prepare(objective, config, 0)
    alone = LossWeights(rec=0.0, sp=0.0, bind=0.0, perp=LossWeights.perp, val=0.0)
    for step in range(STEPS):
        rows, concept = planted(ROWS, generator)
        counts = torch.tensor([ROWS, ROWS, 0.0])
        loss, _ = strategy.forward(MicroBatch(rows, concept, torch.full((ROWS,), -1), counts), alone, True, step)
        strategy.backward(loss, last=True)
        strategy.update(config.lr, config.clip, torch.tensor(True))
        objective.take_up(torch.tensor(True))

    concept_code, after = codes(made, x)
    independent = (before[:, COPIES:] > 0).sum(dim=0), (after[:, COPIES:] > 0).sum(dim=0)
    assert float(independent[1].sum()) == pytest.approx(float(independent[0].sum()), rel=0.02)
    for begin, end in ((0, 20), (20, 40), (40, 60)):  # frequent and rare ones alike
        assert float(independent[1][begin:end].sum()) == pytest.approx(float(independent[0][begin:end].sum()), rel=0.02)
    assert (concept_code > 0).any(dim=0).all()
    assert float(orthogonality(concept_code, after[:, :COPIES])) < COPIES / 50
