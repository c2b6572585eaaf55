"""Rivals of the concept slots: each against the definition that makes it what it is."""

import math
from dataclasses import replace
from functools import partial
from statistics import harmonic_mean

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from tests.support.language_model import (
    CONCEPTS,
    WIDTH,
    random_dictionary,
    tiny_model,
    tiny_prompts,
    tiny_tokenizer,
    words,
)
from trainer.analysis.interventions import Swap, generate_edited
from trainer.analysis.movement import divergence
from trainer.analysis.rivals import (
    Alignment,
    Erasure,
    Learning,
    Lesson,
    MeanDifference,
    Method,
    Slots,
    TrainingRows,
    best_slots,
    fit_probe,
    learn_basis,
    learn_rows,
    lesson_loss,
    slot_means,
    training_rows,
    when_read,
)
from trainer.analysis.rivals import probe as probe_module
from trainer.analysis.rivals.erasure import shrunk
from trainer.analysis.rivals.learning import batches_of
from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.errors import DataError
from trainer.language_model import Edit, EditableModel

SOURCE, TARGET = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 0, 1])


def sample(*, none: int = 0, apart: float = 2.0, rows: int = 60, seed: int = 0) -> TrainingRows:
    """Rows of three concepts around means of their own, with a covariance that is not round; the last have none."""
    generator = torch.Generator().manual_seed(seed)
    means = apart * torch.randn(4, WIDTH, generator=generator)
    concept = torch.arange(rows + none) % 3
    concept[rows:] = 3
    noise = torch.randn(len(concept), WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return TrainingRows(means[concept] + 0.3 * noise, torch.eye(4, dtype=torch.bool)[concept][:, :3])


def methods(rows: TrainingRows) -> dict[str, Method]:
    """All kinds, fitted or made up where they would have to learn."""
    dictionary = random_dictionary()
    basis = torch.linalg.qr(torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(1))).Q
    return {
        "slots": Slots(dictionary, range(3), slot_means(dictionary, rows, range(3))),
        "mean_difference": MeanDifference(rows),
        "probe": fit_probe(rows),
        "erasure": Erasure(rows),
        "das": Alignment(rows, basis),
    }


def test_training_rows_are_those_with_known_labels():
    acts = torch.randn(6, 5)
    concept = torch.tensor([[0, -1], [-1, -1], [1, 0], [-2, -1], [1, -1], [-1, -1]])
    rows = training_rows(lambda: zip(acts.split(2), concept.split(2), strict=True), 2)
    assert rows.member.tolist() == [[True, False], [True, True], [False, False], [False, True]]
    torch.testing.assert_close(rows.acts, acts[[0, 2, 3, 4]])
    torch.testing.assert_close(rows.means, torch.stack([acts[[0, 2]].mean(0), acts[[2, 4]].mean(0)]))
    torch.testing.assert_close(rows.others, torch.stack([acts[[3, 4]].mean(0), acts[[0, 3]].mean(0)]))
    torch.testing.assert_close(rows.centre, acts[3])
    assert rows.several
    with pytest.raises(DataError, match=r"concept number\(s\) \[2\]"):
        training_rows(lambda: [(acts, concept)], 3)


def test_more_rows_than_are_held_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr("trainer.analysis.rivals.rows.BYTES", 5 * 5 * 4)
    acts, concept = torch.arange(12.0)[:, None].expand(12, 5), torch.zeros(12, 1, dtype=torch.int64)
    rows = training_rows(lambda: zip(acts.split(5), concept.split(5), strict=True), 1)
    assert rows.acts[:, 0].tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("name", ["slots", "mean_difference", "probe", "erasure", "das"])
def test_edits_stay_in_their_subspace_and_keep_the_dtype(name):
    rows = sample()
    method, h = methods(rows)[name], torch.randn(4, WIDTH)
    half = torch.randn(4, WIDTH, dtype=torch.bfloat16)
    for edit in (method.swap(SOURCE, TARGET, 1.5), method.suppress(SOURCE)):
        assert edit(half).dtype == torch.bfloat16
        moved = torch.cat([(edit(h + shift) - h - shift) for shift in torch.randn(8, 1, WIDTH)])
        rank = int((torch.linalg.svdvals(moved) > 1e-3).sum())
        assert 0 < rank <= {"slots": 3, "mean_difference": 4, "probe": 4, "erasure": 3, "das": 2}[name]
    # The same row alone or beside others, in any order.
    order = torch.tensor([2, 0, 3, 1])
    alone = method.swap(SOURCE[order], TARGET[order], 1.5)(h[order])
    torch.testing.assert_close(alone, method.swap(SOURCE, TARGET, 1.5)(h)[order])


@pytest.mark.parametrize("name", ["mean_difference", "probe", "erasure"])
def test_what_is_fitted_reads_the_rows_it_was_fitted_on(name):
    rows = sample(apart=3.0)
    method = methods(rows)[name]
    truth = rows.member.int().argmax(dim=1)
    assert bool((method.reads(rows.acts) == truth).all())
    # At strength 1 the mean of the source becomes, as far as the method reads, that of the target.
    swapped = method.swap(SOURCE, TARGET, 1.0)(rows.means[SOURCE])
    assert method.reads(swapped).tolist() == TARGET.tolist()


@pytest.mark.parametrize("name", ["mean_difference", "probe", "erasure"])
def test_rows_without_a_concept_are_read_as_such(name):
    rows = sample(none=20, apart=3.0)
    found = methods(rows)[name].reads(rows.acts)
    assert bool((found[-20:] == -1).all()) and bool((found[:-20] == rows.member[:-20].int().argmax(dim=1)).all())


def test_a_conditional_edit_leaves_rows_that_read_otherwise():
    rows = sample(apart=3.0)
    method = MeanDifference(rows)
    h = rows.means[[0, 1, 0, 2]]
    edit = method.swap(SOURCE, TARGET, 1.0)
    edited = when_read(method, SOURCE, edit)(h)
    torch.testing.assert_close(edited[[0, 1, 3]], edit(h)[[0, 1, 3]])
    torch.testing.assert_close(edited[2], h[2])


def test_no_linear_classifier_finds_erased_concepts():
    rows = sample()
    erased = Erasure(rows).erase(rows.acts)
    prior = float(np.log(3))  # three concepts, equally frequent
    x = ((erased - erased.mean(dim=0)) / erased.std()).double()
    weights, biases = probe_module.fit(x, rows.member, 1e-9, several=False)
    loss = probe_module.cross_entropy(x @ weights.T + biases, rows.member.int().argmax(dim=1))
    assert float(loss) == pytest.approx(prior, abs=1e-4)
    raw = ((rows.acts - rows.mean) / rows.acts.std()).double()
    weights, biases = probe_module.fit(raw, rows.member, 1e-9, several=False)
    assert float(probe_module.cross_entropy(raw @ weights.T + biases, rows.member.int().argmax(dim=1))) < 0.01


def test_one_suppressed_concept_no_longer_covaries_with_anything():
    rows = sample()
    for concept in range(3):
        gone = Erasure(rows).suppress(torch.full((len(rows.acts),), concept))(rows.acts)
        has = rows.member[:, concept].float()
        assert float(((gone - gone.mean(dim=0)).T @ (has - has.mean())).norm() / len(has)) < 1e-4
    other = ((gone - gone.mean(dim=0)).T @ (rows.member[:, 0].float() - 1 / 3)).norm()
    assert float(other) > 1


def test_erasure_is_the_least_change_that_erases():
    """Against the oblique projections of other inner products, which erase too."""
    rows = sample(rows=3000)
    x = (rows.acts - rows.mean).double()
    ours = (Erasure(rows).erase(rows.acts) - rows.acts).square().sum(dim=1).mean()
    across = x.T @ (rows.member.double() - 1 / 3)
    basis = torch.linalg.svd(across, full_matrices=False).U[:, :2]
    orthogonal = (x @ basis).square().sum(dim=1).mean()
    assert float(ours) < float(orthogonal)


def test_certain_covariances_are_not_shrunk():
    x = torch.randn(100_000, 4, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    covariance = torch.cov(x.T, correction=0)
    torch.testing.assert_close(shrunk(covariance, len(x)), covariance, rtol=1e-3, atol=1e-3)
    few = shrunk(covariance, 3)
    assert float(few.trace()) == pytest.approx(float(covariance.trace()))
    assert float(few[3, 3]) < float(covariance[3, 3]) and float(few[0, 0]) > float(covariance[0, 0])


@pytest.mark.parametrize("several", [False, True])
def test_probe_is_the_minimum_of_its_loss(several):
    rows = sample(rows=30, none=6 if several else 0)
    x, l2 = (rows.acts / rows.acts.std()).double(), 0.01
    weights, biases = probe_module.fit(x, rows.member, l2, several=several)
    data, member = x.numpy(), rows.member.numpy().astype(float)

    def loss(flat):
        w, b = flat[: 3 * WIDTH].reshape(3, WIDTH), flat[3 * WIDTH :]
        logits = data @ w.T + b
        if several:
            each = np.logaddexp(0, logits) - member * logits
            total, slope = each.sum() / len(data), (1 / (1 + np.exp(-logits)) - member) / len(data)
        else:
            top = np.log(np.exp(logits).sum(axis=1))
            total, slope = (top - (logits * member).sum(axis=1)).mean(), np.exp(logits - top[:, None]) - member
            slope = slope / len(data)
        return total + l2 / 2 * (w**2).sum(), np.concatenate([(slope.T @ data + l2 * w).ravel(), slope.sum(axis=0)])

    best = minimize(loss, np.zeros(3 * WIDTH + 3), jac=True, method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(weights.numpy().ravel(), best.x[: 3 * WIDTH], atol=1e-4)
    ours = np.concatenate([weights.numpy().ravel(), biases.numpy()])
    assert loss(ours)[0] == pytest.approx(best.fun, abs=1e-9)


def test_probe_chooses_its_l2_on_rows_that_it_does_not_see():
    generator = torch.Generator().manual_seed(0)
    noisy = TrainingRows(
        torch.randn(90, WIDTH, generator=generator), torch.eye(3, dtype=torch.bool)[torch.arange(90) % 3]
    )
    assert fit_probe(noisy).l2 == max(probe_module.L2)  # nothing to learn
    assert fit_probe(sample(apart=3.0, rows=300)).l2 < max(probe_module.L2)


def test_a_strength_of_one_moves_a_probe_as_far_as_the_means_are_apart():
    rows = sample()
    probe = fit_probe(rows)
    moved = probe.swap(torch.tensor([0]), torch.tensor([2]), 1.0)(rows.means[:1])
    verdict = probe.scores(torch.cat([moved, rows.means[2:]]))
    torch.testing.assert_close(verdict[0, 2] - verdict[0, 0], verdict[1, 2] - verdict[1, 0], rtol=1e-3, atol=1e-3)


def test_best_slots_are_those_that_correlate_most():
    rows, dictionary = sample(rows=90), random_dictionary()
    code = dictionary.encode(rows.acts).numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.corrcoef(code.T, rows.member.numpy().T.astype(float))[-3:, :-3]
    assert best_slots(dictionary, rows) == np.nan_to_num(correlation, nan=-9).argmax(axis=1).tolist()
    slots = [5, 0, 40]
    means = torch.stack([torch.tensor(code[rows.member[:, r], slot].mean()) for r, slot in enumerate(slots)])
    torch.testing.assert_close(slot_means(dictionary, rows, slots), means)
    relative = Slots(dictionary, slots, means, relative=True)
    torch.testing.assert_close(relative.scores(rows.acts), torch.tensor(code[:, slots]) / means, rtol=1e-4, atol=1e-4)


def test_an_alignment_replaces_one_component():
    rows = sample()
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(2))).Q
    h = torch.randn(4, WIDTH)
    edited = Alignment(rows, basis).swap(SOURCE, TARGET, 1.0)(h)
    torch.testing.assert_close(edited @ basis, rows.means[TARGET] @ basis, rtol=1e-4, atol=1e-4)
    rest = torch.eye(WIDTH) - basis @ basis.T
    torch.testing.assert_close(edited @ rest, h @ rest, rtol=1e-4, atol=1e-4)


def test_alignment_finds_the_direction_that_decides_the_answer():
    """Class means differ along the direction that the head reads as `rome` or `art`, and further apart along another
    one that the head does not see."""
    model = tiny_model().requires_grad_(False)
    head = model.lm_head.weight.detach()
    said = head[words().index("art")] - head[words().index("rome")]
    said = said / said.norm()
    # What the final norm and head make of it changes no answer.
    unseen = torch.linalg.svd(torch.stack([torch.ones(WIDTH), said])).Vh[-1]
    means = torch.stack([-8 * said - 20 * unseen, 8 * said + 20 * unseen])
    member = torch.eye(2, dtype=torch.bool).repeat(10, 1)
    rows = TrainingRows(means.repeat(10, 1), member)
    swaps = [Swap(p.prompt, s, 1 - s, "", ("rome", "art")[1 - s], p.subject) for p in tiny_prompts() for s in (0, 1)]
    begun = torch.linalg.svd(rows.means - rows.means.mean(dim=0)).Vh[0]
    assert abs(float(begun @ said)) < 0.4
    before = model.lm_head.weight.clone()
    basis = learn_basis(
        EditableModel(model, tiny_tokenizer(), 1), Lesson(swaps), rows, 1, Learning(steps=60, batch=8, rate=0.1)
    )
    torch.testing.assert_close(basis.T @ basis, torch.eye(1))
    assert abs(float(basis[:, 0] @ said)) > 0.8
    assert torch.equal(before, model.lm_head.weight)


def test_learned_rows_are_what_makes_the_slots_answer():
    """Slots that are always active and write nothing that the head reads, until their rows are learned."""
    editable, slots, swaps = silent_slots()
    lesson = Lesson(swaps)
    learned = slots.writing(learn_rows(editable, lesson, slots, Learning(steps=40, batch=8, rate=0.3)))

    def right(method: Slots) -> int:
        texts = generate_edited(editable, swaps, lambda source, target: method.swap(source, target, 1.0), 1)
        return sum(text == swap.target_answer for text, swap in zip(texts, swaps, strict=True))

    assert (right(slots), right(learned)) == (0, len(swaps))
    assert lesson_loss(editable, lesson, learned) < lesson_loss(editable, lesson, slots) - 0.3
    assert torch.equal(slots.rows, torch.ones(3, WIDTH))


def silent_slots() -> tuple[EditableModel, Slots, list[Swap]]:
    editable = EditableModel(tiny_model().requires_grad_(False), tiny_tokenizer(), 1)
    dictionary = ConceptDictionary(DictionaryConfig(4, 4).form(WIDTH, CONCEPTS))
    with torch.no_grad():
        dictionary.concepts.b_enc.fill_(1)
        dictionary.concepts.W_dec.fill_(1)  # the final norm takes a common shift away
    slots = Slots(dictionary, range(3), torch.ones(3))
    swaps = [Swap(p.prompt, s, t, "", ("rome", "art", "acme")[t]) for p in tiny_prompts() for s, t in ((0, 1), (1, 2))]
    return editable, slots, swaps


def test_what_is_learned_with_text_moves_less_beside_the_answers():
    editable, slots, swaps = silent_slots()
    head = editable.model.lm_head  # of a model that is sure of what it says
    head.weight = torch.nn.Parameter(8 * head.weight.detach(), requires_grad=False)
    windows = torch.randint(2, len(words()), (9, 6), generator=torch.Generator().manual_seed(0))
    others = [replace(s, prompt=other.prompt) for s, other in zip(swaps, swaps[5:] + swaps[:5], strict=True)]
    lessons = [Lesson(swaps), Lesson(swaps, others, windows)]
    how = Learning(steps=40, batch=8, rate=0.3)
    loud, quiet = (slots.writing(learn_rows(editable, lesson, slots, how)) for lesson in lessons)

    def shares(method: Slots) -> list[float]:
        """The probability of an answer, and what is left of distributions: geometric means over items, one by one."""
        answers = [-editable.read([s.prompt]).cross_entropy([s.target_answer], edit(method, s))[0] for s in swaps]
        asked = []
        for s in others:
            read = editable.read([s.prompt])
            asked.append(-divergence(read.logits(None)[0, 0], read.logits(edit(method, s))[0, 0]))
        text = []
        for i, ids in enumerate(windows):
            plain = editable.model(input_ids=ids[None]).logits
            every = partial(edited, edit(method, swaps[i], len(ids)))
            handle = editable.model.transformer.h[1].register_forward_hook(every)
            text.append(-divergence(plain, editable.model(input_ids=ids[None]).logits).mean())
            handle.remove()
        return [float(torch.stack(nats).mean().exp()) for nats in (answers, text, asked)]

    def edit(method: Slots, swap: Swap, rows: int = 1) -> Edit:
        return method.swap(torch.tensor([swap.source] * rows), torch.tensor([swap.target] * rows), 1.0)

    def edited(change: Edit, module: torch.nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return change(out[0])[None]

    with torch.no_grad():
        kept = {name: shares(method) for name, method in (("loud", loud), ("quiet", quiet))}
    for name, method in (("loud", loud), ("quiet", quiet)):
        assert lesson_loss(editable, lessons[1], method) == pytest.approx(
            -math.log(harmonic_mean(kept[name])), rel=1e-4
        )
    assert harmonic_mean(kept["quiet"]) > harmonic_mean(kept["loud"]) + 0.05
    assert kept["quiet"][1] > kept["loud"][1] and kept["quiet"][2] > kept["loud"][2]
    bare = lesson_loss(editable, Lesson(swaps, windows=windows), quiet)
    assert bare == pytest.approx(-math.log(harmonic_mean(kept["quiet"][:2])), rel=1e-4)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 5))
def test_learning_meets_every_swap_once_a_round_in_batches_of_few_prompts(pairs: list[tuple[int, int]], size: int):
    swaps = [Swap(f"prompt {p}", 0, t, "", str(i)) for i, (p, t) in enumerate(pairs)]
    batches = batches_of(swaps, Learning(batch=size))
    assert sorted(s.target_answer for _, batch in batches for s in batch) == sorted(s.target_answer for s in swaps)
    for prompts, batch in batches:
        assert 0 < len(batch) <= size and {s.prompt for s in batch} <= {*prompts} and len(prompts) <= size
    assert len({tuple(prompts) for prompts, _ in batches}) == -(-len({s.prompt for s in swaps}) // size)
    assert batches == batches_of(swaps, Learning(batch=size))
