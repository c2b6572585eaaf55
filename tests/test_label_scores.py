"""AUROC, average precision and firing of concept slots against their definitions, row by row."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.language_model import WIDTH, random_dictionary
from trainer import labels, scores
from trainer.analysis.binding_matrix import confusion_matrix
from trainer.analysis.evaluation import activation_blocks, evaluate_split
from trainer.analysis.label_scores import figures_of, reader_figures, slot_scores
from trainer.scores import auroc, average_precision, predicted_slots

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(lambda values: torch.tensor(values).float())
LISTED = [[0], [1, 2], [-2], [-1], [2, 0], [1], [0, 1, 2], [2]]  # what rows say, over and over
TEXT = 9


@pytest.fixture
def sample():
    """Rows that list up to three concepts, have none, or are unknown, and rows of text that say nothing."""
    generator = torch.Generator().manual_seed(2)
    acts = torch.randn(50 + TEXT, WIDTH, generator=generator)
    listed = torch.tensor([row + [-1] * (3 - len(row)) for row in LISTED]).repeat(7, 1)[:50]
    return acts[:50], listed, acts[50:]


def batches(acts, concept, size=7):
    return lambda: zip(acts.split(size), concept.split(size), strict=True)


def unlabelled(acts):
    return batches(acts, torch.full((len(acts), 1), -1))


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES)
def test_ranking_is_that_of_the_definitions(positive, negative):
    pairs = [(p > n) + 0.5 * (p == n) for p, n in itertools.product(positive.tolist(), negative.tolist())]
    assert auroc(positive, negative) == pytest.approx(float(np.mean(pairs)))
    # As the area under the curve of precision over recall, step by step.
    area, found = 0.0, 0
    for bound in sorted({*positive.tolist()}, reverse=True):
        right, wrong = int((positive >= bound).sum()), int((negative >= bound).sum())
        area += (right - found) / len(positive) * right / (right + wrong)
        found = right
    assert average_precision(positive, negative) == pytest.approx(area)


def test_nothing_to_rank_is_no_number():
    none, some = torch.empty(0), torch.ones(3)
    assert np.isnan(auroc(none, some)) and np.isnan(auroc(some, none)) and np.isnan(average_precision(none, some))
    assert average_precision(some, none) == 1.0


@pytest.mark.parametrize("held", [1, 5 * (50 + TEXT) * 2, 1 << 30])  # bytes: one slot at a time, two, all
def test_figures_are_those_of_rows_taken_one_by_one(sample, monkeypatch, held):
    acts, concept, text = sample
    monkeypatch.setattr(scores, "SCORES_BYTES", held)
    dictionary = random_dictionary()
    found = figures_of(slot_scores(dictionary), dictionary.concept_names, batches(acts, concept), unlabelled(text))
    pre = dictionary.concepts.weights().pre_activations(dictionary.normalise(torch.cat([acts, text]))).detach()
    said = [*(set(row) - {-1} for row in concept.tolist()), *(set() for _ in text)]
    assert found["labels"]["rows"] == {
        "listing": sum(max(row, default=-1) >= 0 for row in said),
        "none": said.count({-2}),
        "unknown": said.count(set()),
    }
    silent = [max(row, default=-1) < 0 for row in said]
    for r, name in enumerate(dictionary.concept_names):
        one, score = found["labels"]["per_concept"][name], pre[:, r]
        own, known = torch.tensor([r in row for row in said]), torch.tensor([row != set() for row in said])
        assert one["rows"] == own.sum()
        assert one["auroc"] == pytest.approx(auroc(score[own], score[known & ~own]))
        assert one["average_precision"] == pytest.approx(average_precision(score[own], score[known & ~own]))
        assert one["auroc_against_text"] == pytest.approx(auroc(score[own], score[torch.tensor(silent)]))
        groups = {"own": own, "others": known & ~own, "unknown": ~known, "text": torch.tensor(silent)}
        for group, rows in {**groups, "none": torch.tensor([row == {-2} for row in said])}.items():
            assert one["firing_rate"][group] == pytest.approx((score[rows] > 0).float().mean().item()), group
    code, quiet = pre.clamp_min(0), torch.tensor(silent)
    assert found["text"]["rows"] == quiet.sum()
    assert found["text"]["concept_firing_rate"] == pytest.approx((code[quiet] > 0).float().mean().item())
    assert found["text"]["any_concept_firing_rate"] == pytest.approx((code[quiet] > 0).any(1).float().mean().item())
    assert found["text"]["concept_activation"] == pytest.approx(code[quiet].mean().item(), rel=1e-5)
    per = found["labels"]["per_concept"].values()
    for whole, name in (("auroc", "auroc"), ("mean_average_precision", "average_precision")):
        assert found["labels"][whole] == pytest.approx(np.mean([one[name] for one in per]))
    assert found["text"]["auroc"] == pytest.approx(np.mean([one["auroc_against_text"] for one in per]))


def test_a_row_of_several_concepts_is_right_where_its_slot_is_one_of_them(sample):
    acts, concept, _ = sample
    dictionary = random_dictionary()
    code = dictionary.encode(acts)
    chosen = predicted_slots(code[:, :3])
    confusion = confusion_matrix(chosen, concept, 3)
    rows = labels.listing(concept)
    listed = [set(row) - {-1} for row in concept.tolist()]
    right = [slot in row for slot, row in zip(chosen.tolist(), listed, strict=True) if max(row, default=-1) >= 0]
    assert confusion.sum() == pytest.approx(float(rows.sum()))
    assert confusion.diagonal().sum() == pytest.approx(sum(right))
    assert confusion[:, 3].sum() == pytest.approx(float((chosen[rows] < 0).sum()))
    found = evaluate_split(dictionary, batches(acts, concept), ["a", "b", "c"])
    assert found["binding"]["slot_accuracy"] == pytest.approx(sum(right) / int(rows.sum()))
    assert found["text"]["rows"] == int((~rows).sum())
    member = labels.membership(concept, 3)
    means = torch.cat(list(activation_blocks(dictionary, batches(acts, concept), 3)), dim=1)
    expected = torch.stack([code[member[:, r]].mean(dim=0) for r in range(3)])
    torch.testing.assert_close(means.float(), expected, rtol=1e-5, atol=1e-6)


def test_a_probe_is_measured_as_the_slots_are(sample):
    acts, concept, text = sample
    dictionary = random_dictionary()
    score, names = slot_scores(dictionary), dictionary.concept_names
    ours = figures_of(score, names, batches(acts, concept), unlabelled(text))
    found = reader_figures(score, names, batches(acts, concept), unlabelled(text))
    assert found["auroc"] == ours["labels"]["auroc"] and found["auroc_against_text"] == ours["text"]["auroc"]
    assert found["mean_average_precision"] == ours["labels"]["mean_average_precision"]
    best, listed = score(acts).argmax(dim=1).tolist(), [set(row) - {-1, -2} for row in concept.tolist()]
    right = [chosen in row for chosen, row in zip(best, listed, strict=True) if row]
    assert found["top1"] == pytest.approx(sum(right) / len(right))
    dictionary.concepts.b_enc.data -= 100  # all silent, in the same order
    evaluated = evaluate_split(dictionary, batches(acts, concept), names)["binding"]
    assert evaluated["top1"] == found["top1"] > evaluated["slot_accuracy"] == 0
