"""Binding, fragmentation and reconstruction against plain numpy on the whole code."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.language_model import CONCEPTS, WIDTH, exact_dictionary, random_dictionary
from trainer.analysis import evaluation
from trainer.analysis.binding_matrix import binding, confusion_matrix, restored, stored
from trainer.analysis.evaluation import (
    activation_blocks,
    concept_means,
    concept_slot_means,
    evaluate_split,
    fragmentation,
    reconstruct,
)
from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.errors import DataError
from trainer.scores import predicted_slots


def rows_of(acts, concept, batch=7):
    """Row source over tensors in uneven batches."""
    return lambda: iter([(a, c[:, None]) for a, c in zip(acts.split(batch), concept.split(batch), strict=True)])


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(1)
    acts = torch.randn(41, WIDTH, generator=generator) * 2 + 1
    concept = torch.randint(-1, 3, (41,), generator=generator, dtype=torch.int32)
    return acts, concept


def test_silent_row_is_no_slot_and_counts_as_wrong():
    code = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.2, 0.9]])
    assert predicted_slots(code).tolist() == [-1, 0, 2]
    confusion = confusion_matrix(predicted_slots(code), torch.tensor([[0], [0], [2]]), 3)
    assert confusion.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    found = binding(confusion)
    assert found.slot_accuracy == pytest.approx(2 / 3)
    assert found.silent == pytest.approx(1 / 3)
    assert found.diagonal_accuracy == pytest.approx((0.5 + 1) / 2)  # concept 1 has no row


def test_unlabelled_rows_are_left_out_and_labels_are_checked():
    assert confusion_matrix(torch.tensor([0, 1]), torch.tensor([[-1], [1]]), 2).sum() == 1
    with pytest.raises(DataError, match="label 2 is out of range for 2 concept slots"):
        confusion_matrix(torch.tensor([0]), torch.tensor([[2]]), 2)
    with pytest.raises(DataError, match="no labelled row"):
        binding(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("concepts", [3, 300])
def test_the_matrix_of_many_concepts_is_stored_by_its_cells(concepts):
    chosen, concept = torch.randint(-1, concepts, (500,)), torch.randint(concepts, (500, 1))
    confusion = confusion_matrix(chosen, concept, concepts)
    text = json.dumps(stored(confusion))
    assert torch.equal(restored(json.loads(text), concepts), confusion)
    assert len(text) < 20_000


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda r: st.lists(st.lists(st.integers(0, 9), min_size=r + 1, max_size=r + 1), min_size=r, max_size=r)
    )
)
def test_best_assignment_is_the_best_of_all_permutations(counts):
    confusion = torch.tensor(counts)
    if confusion.sum() == 0:
        return
    found = binding(confusion)
    totals = confusion.sum(1).clamp_min(1)
    share = (confusion[:, :-1] / totals[:, None]).double().numpy()
    present = (confusion.sum(1) > 0).numpy()
    best = (
        max(sum(share[r, s] for r, s in enumerate(order)) for order in itertools.permutations(range(len(counts))))
        / present.sum()
    )
    assert found.diagonal_accuracy_assigned == pytest.approx(best)
    assert found.diagonal_accuracy <= found.diagonal_accuracy_assigned + 1e-12
    assert sorted(found.assignment) == list(range(len(counts)))


def test_permuted_slots_are_wrong_under_identity_and_right_under_assignment():
    found = binding(torch.tensor([[0, 5, 0], [5, 0, 0]]))
    assert (found.diagonal_accuracy, found.diagonal_accuracy_assigned, found.assignment) == (0.0, 1.0, [1, 0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 40), st.integers(1, 7))
def test_fragmentation_in_blocks_matches_the_definition(seed, concepts, slots, block):
    rng = np.random.default_rng(seed)
    mean = rng.exponential(size=(concepts, slots)) * (rng.random((concepts, slots)) < 0.5)
    found = fragmentation(torch.from_numpy(mean).split(block, dim=1))
    for row, efffeat, top1 in zip(mean, found.efffeat, found.top1conc, strict=True):
        if row.sum() == 0:
            assert np.isnan(efffeat) and np.isnan(top1)
            continue
        p = row[row > 0] / row.sum()
        assert efffeat == pytest.approx(np.exp(-(p * np.log(p)).sum()))
        assert top1 == pytest.approx(p.max())


def test_fragmentation_of_one_slot_is_one_and_of_n_equal_slots_is_n():
    found = fragmentation([torch.tensor([[0.0, 3.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0] * 4])])
    np.testing.assert_allclose(found.efffeat[:2], [1, 4])
    np.testing.assert_allclose(found.top1conc[:2], [1, 0.25])
    assert found.mean() == (pytest.approx(2.5), pytest.approx(0.625))  # the silent concept has no spread


@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
def test_reconstruction_matches_the_whole_code(sample, decoder_norm):
    acts, concept = sample
    dictionary = random_dictionary(decoder_norm=decoder_norm)
    z = dictionary.encode(acts)
    h_hat = dictionary.decode(z)
    found = reconstruct(dictionary, rows_of(acts, concept))
    expected = ((acts - h_hat) ** 2).sum() / ((acts - acts.mean(0)) ** 2).sum()
    assert found.rows == len(acts)
    assert found.fvu == pytest.approx(expected.item(), rel=1e-5)
    assert found.l0 == pytest.approx((z > 0).float().sum(1).mean().item())
    assert found.dead == pytest.approx(1 - (z > 0).any(0).float().mean().item())
    assert found.alive == (z[:, :3] > 0).any(0).tolist()
    torch.testing.assert_close(found.confusion, confusion_matrix(predicted_slots(z[:, :3]), concept[:, None], 3))


@pytest.mark.parametrize("sums_bytes", [1, 3 * 8 * 20, 1 << 30])
def test_mean_activations_are_the_same_in_one_pass_and_in_many(sample, monkeypatch, sums_bytes):
    acts, concept = sample
    dictionary = random_dictionary()
    monkeypatch.setattr(evaluation, "SUMS_BYTES", sums_bytes)
    blocks = list(activation_blocks(dictionary, rows_of(acts, concept), 3))
    z = dictionary.encode(acts).double()
    expected = torch.stack([z[concept == r].mean(0) for r in range(3)])
    torch.testing.assert_close(torch.cat(blocks, dim=1), expected, rtol=1e-5, atol=1e-6)
    assert len(blocks) == {1: 5, 3 * 8 * 20: 3, 1 << 30: 1}[sums_bytes]


def test_class_means_and_slot_means(sample):
    acts, concept = sample
    dictionary = random_dictionary()
    rows = rows_of(acts, concept)
    code = dictionary.encode(acts)
    torch.testing.assert_close(concept_means(rows, 3), torch.stack([acts[concept == r].mean(0) for r in range(3)]))
    torch.testing.assert_close(
        concept_slot_means(dictionary, rows), torch.stack([code[concept == r, r].mean() for r in range(3)])
    )
    with pytest.raises(DataError, match=r"no row for concept number\(s\) \[3\]"):
        concept_means(rows, 4)


def test_exact_dictionary_has_no_unexplained_variance_and_sleeping_concept_slots(sample):
    acts, concept = sample
    found = evaluate_split(exact_dictionary(), rows_of(acts, concept), CONCEPTS)
    assert found["reconstruction"]["fvu"] < 1e-12
    assert found["reconstruction"]["l0"] == pytest.approx(WIDTH)  # one of +e_i, -e_i
    assert found["binding"]["slots_alive"] == 0
    assert found["binding"]["slot_accuracy"] == 0
    assert found["fragmentation"]["concept_slots"]["efffeat"] is None
    assert found["fragmentation"]["all"]["efffeat"] > 10


def test_rows_without_labels_have_a_reconstruction_and_nothing_else(sample):
    acts, _ = sample
    unlabelled = torch.full((len(acts),), -1, dtype=torch.int32)
    dictionary = ConceptDictionary(DictionaryConfig(8, 8).form(WIDTH))
    found = evaluate_split(dictionary, rows_of(acts, unlabelled), [])
    assert set(found) == {"rows", "reconstruction"}
    constant = torch.ones(5, WIDTH)
    assert evaluate_split(dictionary, rows_of(constant, unlabelled[:5]), [])["reconstruction"]["fvu"] is None


def test_no_rows_and_rows_that_are_not_finite_are_refused(sample):
    acts, concept = sample
    with pytest.raises(DataError, match="no row"):
        reconstruct(random_dictionary(), lambda: iter(()))
    acts[3, 4] = float("inf")
    with pytest.raises(DataError, match="NaN or infinite"):
        reconstruct(random_dictionary(), rows_of(acts, concept))
