"""The fused objective against the oracle in trainer/losses.py, in value and gradient."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from trainer import following, labels, losses
from trainer.dictionary import BankWeights, ConceptDictionary, DictionaryConfig
from trainer.losses import LossWeights
from trainer.metrics import batch_means
from trainer.objective import AlignObjective
from trainer.sums import SUMS, MicroBatch
from trainer.topology import Topology


def make(D, R, K, bank, answers=5, decoder_norm="free", **options):
    torch.manual_seed(D * 100 + R)
    names = [f"c{i}" for i in range(R)]
    config = DictionaryConfig(K, bank, decoder_norm=decoder_norm, value_hidden=7, gate=options.pop("gate", "relu"))
    dictionary = ConceptDictionary(config.form(D, names, answers))
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for bank in dictionary.free_banks():  # slots that count whole, in part, and not at all
            bank.dependence.uniform_(0.0, 2 * following.DEPENDENT)
    form = {f.name: options.pop(f.name) for f in dataclasses.fields(losses.LossForm) if f.name in options}
    return AlignObjective(dictionary, Topology(), form=losses.LossForm(**form), **{"kernel": "dense"} | options)


def make_batch(B, D, R, answers=5, unlabelled=0.3):
    concept = torch.randint(0, max(R, 1), (B,)) if R else torch.full((B,), -1)
    concept[torch.rand(B) < unlabelled] = -1
    answer = torch.where(concept >= 0, torch.randint(0, answers, (B,)), -1)
    counts = torch.tensor([B, (concept >= 0).sum(), (answer >= 0).sum()], dtype=torch.float32)
    return MicroBatch(torch.randn(B, D), concept[:, None], answer, counts)


def oracle(objective, batch, weights, align):
    d = objective.dictionary
    banks = [bank.weights() for bank in d.free_banks()]
    free = BankWeights(
        torch.cat([bank.W_enc for bank in banks]),
        torch.cat([bank.b_enc for bank in banks]),
        torch.cat([bank.W_dec for bank in banks]),
        None if banks[0].threshold is None else torch.cat([bank.threshold for bank in banks]),
        decoder_norm=d.form.decoder_norm,
        perp_weight=torch.cat([following.perp_weight(bank.dependence) for bank in d.free_banks()]),
        bandwidth=objective.form.bandwidth,
        dead=torch.cat([bank.last_fired == 0 for bank in d.free_banks()]) if weights.pull else None,
    )
    plain = losses.PlainDictionary(free, d.concepts.weights(), d.output.b_dec, d.value_head)
    x = d.normalise(batch.acts)
    terms = losses.plain_objective(plain, x, batch.concept, batch.answer, align, objective.form)
    return losses.weighted(terms, weights), terms


SHAPES = [(7, 3, 20, 8, 11), (16, 1, 33, 33, 1), (5, 12, 9, 4, 40), (8, 0, 10, 4, 6), (24, 6, 64, 16, 33)]


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decoder_norm,bind_on", [("free", "pre"), ("unit", "code")])
def test_value_and_gradient_equal_the_oracle(shape, align, decoder_norm, bind_on):
    D, R, K, bank, B = shape
    objective = make(D, R, K, bank, decoder_norm=decoder_norm, bind_on=bind_on)
    batch = make_batch(B, D, R)
    weights = LossWeights(rec=1.0, sp=0.3, bind=0.7, perp=0.2, val=0.4)
    expected, terms = oracle(objective, batch, weights, align)
    parameters = dict(objective.named_parameters())
    grads = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    before = [bank.dependence.clone() for bank in objective.dictionary.free_banks()]
    loss, sums = objective(batch, weights, align, step=1)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    objective.take_up(torch.tensor(True))
    dependence = [bank.dependence for bank in objective.dictionary.free_banks()]
    assert all(torch.equal(a, b) for a, b in zip(before, dependence, strict=True)) == (not align or not R or B < 2)
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, torch.zeros_like(parameter) if grad is None else grad, rtol=2e-4, atol=2e-5, msg=name
        )
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    assert total["rows"] == B
    assert total["rec"] / B == pytest.approx(terms["rec"].item(), rel=1e-5)
    assert total["perp"] == pytest.approx(float(terms["perp"]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("decoder_norm,kernel", [("free", "dense"), ("unit", "sparse"), ("free", "sparse")])
def test_thresholds_that_are_trained_equal_the_oracle(align, decoder_norm, kernel):
    objective = make(16, 3, 50, 20, decoder_norm=decoder_norm, kernel=kernel, gate="jumprelu", bandwidth=0.4)
    batch = make_batch(40, 16, 3)
    with torch.no_grad():
        for number, bank in enumerate(objective.dictionary.free_banks()):
            bank.level.copy_(bank.gate.tensors_at(torch.empty(bank.slots).uniform_(0.05, 1.0))["level"])
            bank.last_fired[number::2] = 6
    weights = LossWeights(rec=1.0, sp=0.3, pull=0.5, bind=0.7, perp=0.2, val=0.4)
    parameters = dict(objective.named_parameters())
    expected, terms = oracle(objective, batch, weights, align)
    grads = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    objective.dead_after = 5
    loss, sums = objective(batch, weights, align, step=7)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        want = torch.zeros_like(parameter) if grad is None else grad
        torch.testing.assert_close(parameter.grad, want, rtol=2e-4, atol=2e-5, msg=name)
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    assert total["sp"] == total["active"] > 0
    assert total["pull"] / 40 == pytest.approx(float(terms["pull"]), rel=1e-4) and total["pull"] > 0


FORMS = [
    {"binding": "softmax"},
    {"binding": "sigmoid"},
    {"binding": "sigmoid", "bind_balance": True},
    {"binding": "squares"},
    {"binding": "squares", "bind_on": "code"},
]


def labelled_batch(B, D, R, M, form):
    """Rows that list up to M concepts, rows that have none, and unknown rows."""
    batch = make_batch(B, D, R)
    listed = torch.stack([torch.randperm(R)[:M] for _ in range(B)])
    listed[torch.arange(M) >= torch.randint(1, M + 1, (B, 1))] = labels.UNKNOWN
    listed[:, 0] = torch.where(torch.arange(B) % 4 == 1, labels.NONE, listed[:, 0])
    listed[torch.arange(B) % 4 == 1, 1:] = labels.UNKNOWN
    listed[::4] = labels.UNKNOWN
    batch.concept, batch.counts[1] = listed, form.counted(listed).sum()
    if form.bind_balance:
        batch.positives = labels.membership(listed, R).sum(dim=0).float()
    return batch


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("B,R,M", [(1, 1, 1), (3, 3, 2), (40, 6, 1), (41, 6, 3), (30, 70, 5)])
def test_labels_of_every_kind_equal_the_oracle(B, R, M, form):
    objective = make(9, R, 20, 8, **form)
    batch = labelled_batch(B, 9, R, M, objective.form)
    weights = LossWeights(rec=0.1, sp=0.3, bind=0.7, perp=0.2, val=0.4, sp_concept=0.6)
    parameters = list(objective.parameters())
    expected, _ = oracle(objective, batch, weights, True)
    grads = torch.autograd.grad(expected, parameters)
    loss, sums = objective(batch, weights, True, step=1)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=2e-4, atol=2e-5)
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    assert total["listing"] == labels.listing(batch.concept).sum() and total["labelled"] == batch.counts[1]
    logits = objective.dictionary.concepts.weights().pre_activations(objective.dictionary.normalise(batch.acts))
    top = (logits.relu() if objective.form.bind_on == "code" else logits).argmax(dim=1).tolist()
    assert total["bound"] == sum(top[row] in batch.concept[row].tolist() for row in range(B))
    # Micro-batches add up to the batch, whatever labels they hold.
    objective.zero_grad()
    weights = dataclasses.replace(weights, perp=0.0)
    expected, _ = oracle(objective, batch, weights, True)
    grads = torch.autograd.grad(expected, parameters)
    batch.part_rows = torch.tensor([float(len(part)) for part in torch.tensor_split(batch.acts, 3)])
    for part in batch.split(3):
        objective(part, weights, True, 1)[0].backward()
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=2e-4, atol=2e-5)


def test_independent_concepts_by_hand():
    """One concept: two rows with it, one without, one unknown."""
    logits, concept = torch.tensor([[1.0], [2.0], [-1.0], [5.0]]), torch.tensor([[0], [0], [-2], [-1]])
    with_it = [np.log1p(np.exp(-1.0)), np.log1p(np.exp(-2.0))]
    without_it = np.log1p(np.exp(-1.0))
    plain = (sum(with_it) + without_it) / 3
    assert float(losses.independent(logits, concept, False)) == pytest.approx(plain, rel=1e-6)
    halves = sum(with_it) / 2 / 2 + without_it / 2
    assert float(losses.independent(logits, concept, True)) == pytest.approx(halves, rel=1e-6)
    # The row that has none is to be 0, the others 1.
    assert float(losses.squares(logits, concept)) == pytest.approx((0.0 + 1.0 + 1.0) / 3)
    # Softmax counts what is listed alone, one half for each of two.
    logits, concept = torch.tensor([[1.0, 3.0, 0.0], [9.0, 0.0, 0.0]]), torch.tensor([[0, 1], [-2, -1]])
    assert float(losses.binding(logits, concept)) == pytest.approx(
        np.log(np.exp([1.0, 3.0, 0.0]).sum()) - 2.0, rel=1e-6
    )


# bf16 keeps 8 bits: products are off by about 2^-9, which the loss shows. Encoder gradients show more, since entries
# near 0 change sides: those of the concept slots, and with the dense kernel those of the free slots too. Each is about
# twice the largest error that was measured over the cases below.
BF16_LOSS = 3e-3
BF16_GRADIENT = {
    "dense": {"banks.W_enc": 0.13, "banks.b_enc": 0.035, "banks.W_dec": 6e-3},
    "sparse": {"banks.W_enc": 8e-3, "banks.b_enc": 5e-3, "banks.W_dec": 5e-3},
}
BF16_SHARED = {"concepts.W_enc": 0.065, "concepts.b_enc": 0.02, "concepts.W_dec": 6e-3, "output.b_dec": 5e-3}
BF16_VALUE_HEAD = 0.07


def bf16_tolerance(kernel: str, name: str) -> float:
    """Of the gradient of one parameter, by its name in the objective."""
    unit, *_, parameter = name.removeprefix("dictionary.").split(".")
    if unit == "value_head":
        return BF16_VALUE_HEAD
    return (BF16_GRADIENT[kernel] | BF16_SHARED)[f"{unit}.{parameter}"]


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("bind_on", ["pre", "code"])
@pytest.mark.parametrize("R", [6, 64, 1000, 1500])
def test_bf16_products_stay_near_the_oracle(R, bind_on, kernel):
    objective = make(48, R, 60, 25, answers=9, bind_on=bind_on, kernel=kernel, precision="bf16")
    batch = make_batch(96, 48, R, answers=9)
    weights = LossWeights(rec=1.0, sp=0.3, bind=0.7, perp=0.2, val=0.4)
    expected, _ = oracle(objective, batch, weights, True)
    parameters = dict(objective.named_parameters())
    grads = torch.autograd.grad(expected, list(parameters.values()))
    loss, sums = objective(batch, weights, True, step=1)
    loss.backward()
    assert (objective.concept_dtype == torch.float32) == (R == 6)  # few concepts stay in fp32
    assert loss.dtype == torch.float32 and sums.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=BF16_LOSS, atol=0.0)
    for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - grad).norm() / grad.norm()
        assert error <= bf16_tolerance(kernel, name), f"{name}: {float(error):.1e}"


def test_unlabelled_batch_gives_no_label_terms():
    objective = make(6, 3, 10, 4)
    batch = make_batch(9, 6, 3, unlabelled=1.1)
    _, sums = objective(batch, LossWeights(), True, 1)
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    assert total["bind"] == total["val"] == total["labelled"] == total["bound"] == 0


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_a_batch_whose_rows_are_all_masked_changes_nothing(kernel):
    objective = make(6, 3, 10, 4, kernel=kernel)
    batch = make_batch(0, 6, 3)
    loss, sums = objective(batch, LossWeights(), True, 7)
    loss.backward()
    assert float(loss.detach()) == 0 and not sums.any()
    assert all(not p.grad.any() for p in objective.parameters())
    assert all(not bank.last_fired.any() for bank in objective.dictionary.free_banks())


def test_micro_batches_add_up_to_the_batch_without_orthogonality():
    """Gradient accumulation changes nothing but memory for every term but perp, whose correlation needs all rows at
    once."""
    objective = make(8, 3, 20, 6)
    batch, weights = make_batch(12, 8, 3), LossWeights(perp=0.0)
    loss, _ = objective(batch, weights, True, 1)
    loss.backward()
    whole = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    for part in (slice(0, 5), slice(5, 12)):
        micro = MicroBatch(batch.acts[part], batch.concept[part], batch.answer[part], batch.counts)
        objective(micro, weights, True, 1)[0].backward()
    for a, p in zip(whole, objective.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_many_concepts_are_alike_in_every_kernel():
    """A micro-batch is not centred by itself, which the sparse kernel's sums over pairs of rows would need."""
    found = []
    for kernel in ("dense", "sparse"):
        objective = make(8, 60, 200, 100, kernel=kernel)
        batch = make_batch(16, 8, 60)
        for part in (slice(0, 8), slice(8, 16)):
            micro = MicroBatch(batch.acts[part], batch.concept[part], batch.answer[part], batch.counts)
            objective(micro, LossWeights(perp=1.0), True, 1)[0].backward()
        found.append([p.grad for p in objective.parameters()])
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(dense, sparse, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))


@pytest.mark.parametrize("B,R,K", itertools.product([4, 50], [1, 5], [1, 7]))
def test_orthogonality_matches_numpy_corrcoef(B, R, K):
    a, b = torch.rand(B, R, dtype=torch.float64), torch.rand(B, K, dtype=torch.float64)
    full = np.corrcoef(a.numpy(), b.numpy(), rowvar=False)
    expected = (np.atleast_2d(full)[:R, R:] ** 2).sum()
    assert float(losses.orthogonality(a, b)) == pytest.approx(expected, rel=1e-9)


def test_constant_slots_have_no_correlation():
    a, b = torch.rand(20, 2), torch.rand(20, 3)
    a[:, 0], b[:, 1] = 0.5, 0.0
    assert torch.isfinite(losses.orthogonality(a, b))
    assert float(losses.orthogonality(a[:, :1], b)) == 0.0


def test_slots_that_fire_are_noted():
    objective = make(6, 2, 10, 4)
    with torch.no_grad():
        next(objective.dictionary.free_banks()).b_enc.fill_(-1e6)
    objective(make_batch(9, 6, 2), LossWeights(), False, step=17)
    first, second, _ = objective.dictionary.free_banks()
    assert (first.last_fired == 0).all() and (second.last_fired == 17).any()


def test_every_term_is_known_wherever_terms_are():
    """A term that is left out of one place trains, but is missing from the loss that is logged and guarded."""
    names = [term.name for term in losses.TERMS]
    assert [field.name for field in dataclasses.fields(LossWeights)] == names
    assert [field.name for field in dataclasses.fields(losses.StageWeights)] == names
    assert {term.mean_over for term in losses.TERMS} <= {*losses.COUNTS, "steps"}
    assert set(names) <= set(SUMS)
    objective, batch = make(6, 3, 10, 4, gate="jumprelu"), make_batch(9, 6, 3, unlabelled=0.0)
    with torch.no_grad():
        next(objective.dictionary.free_banks()).level.fill_(0.1)  # slots that never fire
    _, plain = oracle(objective, batch, LossWeights(), True)
    assert list(plain) == names
    for term in losses.TERMS:
        weights = LossWeights(**{name: float(name == term.name) for name in names})
        for align in (False, True):
            stage = "align" if align else "pretrain"
            loss, sums = objective(batch, weights, align, 9)
            means = batch_means(dict(zip(SUMS, sums.tolist(), strict=True)))
            assert losses.weighted(means, weights) == pytest.approx(float(loss.detach()), rel=1e-5)
            assert (float(loss.detach()) != 0) == term.counts_in(stage), (term, stage)
