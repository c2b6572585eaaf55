"""Stages and schedules as functions of the step, and how concept slots wake up."""

import pytest
import torch

from trainer.curriculum import Curriculum, StageConfig
from trainer.errors import UserError
from trainer.losses import LossConfig, StageWeights
from trainer.optimizer import OptimConfig
from trainer.topology import Topology
from trainer.waking import FAINT, QUIET, ClassMeans, class_means, concept_weights, exclusive_weights, lowering, scatter


def curriculum(warmup=0, decay=0.0, **loss):
    stages = [StageConfig("pretrain", epochs=2), StageConfig("align", steps=6, loss=StageWeights(sp=0.5))]
    return Curriculum(stages, LossConfig(**loss), OptimConfig(lr=1.0, warmup=warmup, decay=decay), [5] * len(stages))


def test_stages_are_laid_end_to_end():
    c = curriculum(sp=0.1)
    assert c.total == 16
    assert [c.at(s).stage for s in (0, 9, 10, 15)] == ["pretrain", "pretrain", "align", "align"]
    assert [s for s in range(c.total) if c.at(s).align] == list(range(10, 16))
    assert c.at(0).weights.sp == 0.1 and c.at(10).weights.sp == 0.5


def test_rate_warms_up_at_each_stage_and_decays_at_the_end():
    c = curriculum(warmup=3, decay=0.25)
    rates = [c.at(s).lr for s in range(c.total)]
    assert rates[0] == pytest.approx(0.25) and rates[3] == 1.0
    assert rates[10] == pytest.approx(0.25) and rates[13] == pytest.approx(0.75)
    assert rates[15] == pytest.approx(0.25)


def test_sparsity_warms_up_once():
    c = curriculum(sp=1.0, sp_warmup=4)
    assert [c.at(s).weights.sp for s in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert c.at(10).weights.sp == 0.5


@pytest.mark.parametrize(
    "stages,message",
    [
        ([], "empty"),
        ([StageConfig("align", steps=1), StageConfig("pretrain", steps=1)], "cannot go back"),
        ([StageConfig("warm", steps=1)], "unknown"),
        ([StageConfig("align")], "exactly one"),
        ([StageConfig("align", steps=1, epochs=1)], "exactly one"),
        ([StageConfig("align", steps=0)], "at least 1"),
        ([StageConfig("align", epochs=float("inf"))], "finite"),
        ([StageConfig("align", epochs=float("nan"))], "finite"),
        ([StageConfig("align", steps=1, loss=StageWeights(perp=-1.0))], r"stages.0.loss.perp=-1.0"),
    ],
)
def test_impossible_stages_are_refused(stages, message):
    with pytest.raises(UserError, match=message):
        Curriculum(stages, LossConfig(), OptimConfig(), [10] * len(stages))


def test_class_means_ignore_unlabelled_rows():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 4.0], [9.0, 9.0]])
    concept = torch.tensor([[0], [0], [1], [-1]])
    classes = class_means([(x[:2], concept[:2]), (x[2:], concept[2:])], 3, 2, Topology())
    torch.testing.assert_close(classes.means, torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    assert classes.counts.tolist() == [2, 1, 0]


def test_class_means_of_rows_that_list_several_concepts_or_none():
    """And the slots of independent concepts, which are set against the rows without them: one alone is alive too."""
    torch.manual_seed(1)
    x, concept = torch.randn(6, 4), torch.tensor([[0, 1], [1, -1], [-2, -1], [-1, -1], [1, 0], [-2, -1]])
    classes = class_means([(x[:3], concept[:3]), (x[3:], concept[3:])], 3, 4, Topology())
    rows = [([0, 4], [1, 2, 5]), ([0, 1, 4], [2, 5]), ([], [0, 1, 2, 4, 5])]
    for r, (having, others) in enumerate(rows):
        assert (classes.counts[r], classes.other_counts[r]) == (len(having), len(others))
        torch.testing.assert_close(classes.others[r], x[others].mean(dim=0))
        if having:
            torch.testing.assert_close(classes.means[r], x[having].mean(dim=0))
    weights = concept_weights(classes, "sigmoid")
    for mean, sign in ((classes.means, 1.0), (classes.others, -1.0)):
        pre = (mean * weights["W_enc"]).sum(dim=1) + weights["b_enc"]
        torch.testing.assert_close(pre, torch.tensor([sign, sign, 0.0]), rtol=1e-4, atol=1e-5)


def test_slots_wake_up_alive_on_their_own_concept():
    torch.manual_seed(0)
    means = torch.randn(5, 16)
    none = torch.zeros(5, 16)
    weights = concept_weights(ClassMeans(means, torch.tensor([3.0, 1.0, 2.0, 9.0, 0.0]), none, none[:, 0]))
    pre = means[:4] @ weights["W_enc"].T + weights["b_enc"]
    torch.testing.assert_close(pre.diagonal(), torch.ones(4), rtol=1e-4, atol=1e-5)
    assert (pre.argmax(dim=1) == torch.arange(4)).all()
    centre = means[:4].mean(dim=0)
    torch.testing.assert_close(
        centre @ weights["W_enc"].T[:, :4] + weights["b_enc"][:4], -torch.ones(4), rtol=1e-4, atol=1e-5
    )
    assert not weights["W_dec"].any()  # what free slots reconstruct already is not added again
    assert (weights["W_enc"][4] == 0).all() and weights["b_enc"][4] == 0


@pytest.mark.parametrize("concepts,apart", [(5, 4.0), (200, 0.3)])
def test_slots_of_classes_that_lie_close_wake_up_quiet(concepts, apart):
    """Biases are lowered as far as that needs and no further, by as much for all, which a softmax does not see."""
    generator = torch.Generator().manual_seed(0)
    concept = torch.arange(2000)[:, None] % concepts
    centres = apart * torch.randn(concepts, 32, generator=generator)
    x = centres[concept[:, 0]] + torch.randn(2000, 32, generator=generator)
    concept[::7] = -1
    batches = [(x[:700], concept[:700]), (x[700:], concept[700:])]
    weights = concept_weights(class_means(batches, concepts, 32, Topology()))
    pre = (x @ weights["W_enc"].T + weights["b_enc"])[concept[:, 0] >= 0]
    down = lowering(weights, batches, Topology())
    active = [float((pre > by).sum(dim=1).double().mean()) for by in (0.0, down, down - 0.1)]
    assert active[1] <= QUIET
    assert (down == 0.0 and active[0] <= QUIET) if concepts == 5 else min(active[0], active[2]) > QUIET


def test_classes_that_lie_close_are_told_by_what_varies_least_within_them():
    """Rows scatter most where the classes do not differ, as prompts do over templates."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.cat([torch.full((8,), 8.0), torch.full((24,), 0.3)])
    concept = torch.arange(6000)[:, None] % 60
    centres = torch.randn(60, 32, generator=generator) * (spread < 1.0)
    x = centres[concept[:, 0]] + spread * torch.randn(6000, 32, generator=generator)
    batches = [(x[:700], concept[:700]), (x[700:], concept[700:])]
    classes = class_means(batches, 60, 32, Topology())

    def right(weights):
        pre = x @ weights["W_enc"].T + weights["b_enc"]
        return float((pre.argmax(dim=1) == concept[:, 0]).double().mean()), float((pre > 0).sum(dim=1).double().mean())

    plain, _ = right(concept_weights(classes))
    woken, active = right(exclusive_weights(classes, lambda: iter(batches), Topology()))
    assert plain < 0.9 < 0.99 < woken and active <= QUIET


def test_no_slot_of_classes_that_lie_close_sleeps_on_all_of_its_rows():
    """Rows of some classes scatter so that one shift for all would put their slots to sleep for good."""
    generator = torch.Generator().manual_seed(0)
    concept = torch.arange(3000)[:, None] % 200
    centres = 0.3 * torch.randn(200, 16, generator=generator)
    x = centres[concept[:, 0]] + torch.randn(3000, 16, generator=generator)
    batches = [(x[:700], concept[:700]), (x[700:], concept[700:])]
    classes = class_means(batches, 200, 16, Topology())

    def highest(weights):
        pre = x @ weights["W_enc"].T + weights["b_enc"]
        return torch.stack([pre[concept[:, 0] == r, r].max() for r in range(200)]), (pre > 0).sum(dim=1).double().mean()

    shifted = concept_weights(classes, covariance=scatter(batches, classes, Topology()))
    shifted["b_enc"] -= lowering(shifted, batches, Topology())
    before, _ = highest(shifted)
    after, active = highest(exclusive_weights(classes, lambda: iter(batches), Topology()))
    assert before.min() < 0 < FAINT - 1e-4 <= after.min() and active <= QUIET + 1
    torch.testing.assert_close(after, before.clamp_min(FAINT))
