"""What a swap leaves alone: each figure against the plain computation on a tiny model."""

import math

import pytest
import torch

from tests.support.language_model import CONCEPTS, WIDTH, tiny_model, tiny_prompts, tiny_tokenizer
from trainer.analysis.interventions import Swap, SwapScore, swap_pairs
from trainer.analysis.movement import divergence
from trainer.analysis.rivals import MeanDifference, TrainingRows, when_read
from trainer.analysis.side_effects import (
    Bystanders,
    Harm,
    beginnings,
    joint_score,
    joint_without,
    other_questions,
)
from trainer.analysis.statistics import jackknife_error, mean_by_subject
from trainer.errors import UserError
from trainer.language_model import EditableModel, answer_matches, encode_prompts, generate_answers

LAYER = 1
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4))
TEXTS = ["Q where ann city rome Q which bob", "Q where cem", "Q which dan work acme Q where ann"]


def bystanders(windows: torch.Tensor | None = None, batch_size: int = 5) -> Bystanders:
    """Other questions of some swaps, answered as the model does: all are right without an edit."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    others = other_questions(
        tiny_prompts(), CONCEPTS, swap_pairs(tiny_prompts(), CONCEPTS, split="heldout", pairs=18, seed=0), 0
    )
    said = generate_answers(model, tokenizer, [s.prompt for s in others], 1)
    others = [Swap(s.prompt, s.source, s.target, text, "", s.subject) for s, text in zip(others, said, strict=True)]
    editable = EditableModel(model, tokenizer, LAYER, batch_size)
    return Bystanders(editable, others, windows, match=answer_matches, max_new_tokens=1)


def pushed(source, target):
    """An edit that depends on the pair."""
    shift = (source - 2.0 * target)[:, None] * DIRECTION
    return lambda h: h + shift


def test_other_questions_are_of_the_same_subject_and_neither_concept():
    swaps = swap_pairs(tiny_prompts(), CONCEPTS, split="heldout", pairs=24, seed=0)
    asked = {p.prompt: p for p in tiny_prompts()}
    found = other_questions([p for p in tiny_prompts() if p.split == "heldout"], CONCEPTS, swaps, 0)
    assert len(found) == len(swaps)
    for swap, other in zip(swaps, found, strict=True):
        prompt = asked[other.prompt]
        assert (other.source, other.target, other.subject) == (swap.source, swap.target, swap.subject)
        assert prompt.subject == swap.subject and prompt.answer == other.source_answer and prompt.split == "heldout"
        assert CONCEPTS.index(prompt.concept) not in (swap.source, swap.target)
    city_alone = other_questions(tiny_prompts()[:2], CONCEPTS, swaps, 0)
    assert {(s.subject, s.source, s.target) for s in city_alone} == {("ann", 1, 2), ("ann", 2, 1)}


def test_no_edit_does_no_harm():
    harm = bystanders(beginnings(tiny_tokenizer(), TEXTS, 9, 6)).harm(lambda s, t: lambda h: h)
    assert (harm.isolation, harm.quiet) == (1, 1)
    assert harm.prompt_kl == harm.text_kl == harm.text_nats == 0 and harm.fluency == 1


@pytest.mark.parametrize("batch_size", [5, 256])
def test_questions_are_compared_row_by_row(batch_size):
    beside = bystanders(batch_size=batch_size)
    harm = beside.harm(pushed)
    model, tokenizer = tiny_model().requires_grad_(False), tiny_tokenizer()
    for other, kept, moved in zip(beside.others, harm.kept, harm.moved, strict=True):
        ids, _ = encode_prompts(tokenizer, [other.prompt])
        plain = model(ids).logits[0, -1]
        # The edited block is the last: what follows it is the final norm and the head.
        h = _before_norm(model, ids)[0, -1] + (other.source - 2.0 * other.target) * DIRECTION
        edited = model.lm_head(model.transformer.ln_f(h))
        assert moved == pytest.approx(float(divergence(plain, edited)), abs=1e-5)
        assert kept == (tokenizer.decode(edited.argmax()) == other.source_answer)
    assert harm.subjects == [s.subject for s in beside.others]
    assert 0 < sum(harm.kept) < len(harm.kept)


def test_where_the_source_is_read_alone_is_what_a_conditional_edit_gives():
    """A reader that says yes at some of the questions, though they ask neither for source nor for target."""
    model, beside = tiny_model(), bystanders(beginnings(tiny_tokenizer(), TEXTS, 9, 6))
    ends = EditableModel(model, tiny_tokenizer(), LAYER, 4).ends([s.prompt for s in beside.others])
    for i, other in enumerate(beside.others):
        ids, _ = encode_prompts(tiny_tokenizer(), [other.prompt])
        torch.testing.assert_close(ends[i], _before_norm(model, ids)[0, -1], rtol=1e-4, atol=1e-5)
    means = ends[:3] * 3
    method = MeanDifference(TrainingRows(means, torch.eye(3, dtype=torch.bool)))
    sources = torch.tensor([s.source for s in beside.others])
    read = method.reads(ends) == sources
    assert 0 < int(read.sum()) < len(read)
    always, when = beside.harms(method, 4.0)
    plain = beside.harm(lambda s, t: when_read(method, s, method.swap(s, t, 4.0)))
    assert always == beside.harm(lambda s, t: method.swap(s, t, 4.0))
    assert when.kept == plain.kept and when.kept != always.kept
    assert when.moved == pytest.approx(plain.moved, abs=1e-5)
    assert (when.text_kl, when.text_nats) == (plain.text_kl, plain.text_nats)


def _before_norm(model, ids):
    kept = []
    handle = model.transformer.h[LAYER].register_forward_hook(
        lambda m, i, o: kept.append(o[0] if isinstance(o, tuple) else o)
    )
    model(ids)
    handle.remove()
    return kept[0]


def test_text_is_edited_at_every_token_and_continuations_are_read_by_the_unedited_model():
    tokenizer = tiny_tokenizer()
    windows = beginnings(tokenizer, TEXTS, 9, 6)
    assert windows.shape == (2, 6)  # one text is shorter
    beside, model = bystanders(windows), tiny_model().requires_grad_(False)
    harm = beside.harm(pushed)
    pairs = [(s.source, s.target) for s in beside.others[:2]]
    moved, nats = [], {"own": 0.0, "edited": 0.0}
    for ids, (source, target) in zip(windows, pairs, strict=True):
        shift = (source - 2.0 * target) * DIRECTION
        edited = model.lm_head(model.transformer.ln_f(_before_norm(model, ids[None])[0] + shift))
        moved += divergence(model(ids[None]).logits[0], edited).tolist()
        for name, change in (("own", 0.0), ("edited", shift)):
            text = ids[:3]
            for _ in range(3):
                logits = model.lm_head(model.transformer.ln_f(_before_norm(model, text[None])[0, -1] + change))
                text = torch.cat([text, logits.argmax()[None]])
            told = model(text[None]).logits[0, 2:5].log_softmax(dim=1)
            nats[name] -= float(told[range(3), text[3:]].sum()) / 6
    assert harm.text_kl == pytest.approx(sum(moved) / 12, rel=1e-4)
    assert harm.text_nats == pytest.approx(nats["edited"] - nats["own"], rel=1e-3, abs=1e-5)
    with pytest.raises(UserError, match="no text has 30 tokens"):
        beginnings(tokenizer, TEXTS, 9, 30)


def test_scores_are_what_the_documents_say():
    harm = Harm(["a", "b"], [True, False], [0.0, 2.0], 0.5, -0.1)
    assert (harm.isolation, harm.prompt_kl, harm.fluency) == (0.5, 1.0, 1.0)
    assert harm.quiet == pytest.approx((math.exp(-1) + math.exp(-0.5) + 1) / 3)
    some = harm.where(torch.tensor([True, False]), 0.25, 0.5)
    assert (some.kept, some.moved, some.text_kl, some.text_nats) == ([True, True], [0.0, 0.0], 0.25, 0.5)
    ends = SwapScore(["other", "target_answer"]).where(torch.tensor([False, True]), SwapScore(["source_answer"] * 2))
    assert ends.kinds == ["source_answer", "target_answer"]
    quiet = (math.exp(-1) + math.exp(-0.5) + 1) / 3
    assert joint_score(0.8, harm.isolation, harm.quiet) == pytest.approx(3 / (1 / 0.8 + 2 + 1 / quiet))
    assert joint_score(0.0, 1.0, 1.0) == 0
    alone = Harm([], [], [], None, None)
    assert alone.isolation is alone.quiet is None and joint_score(0.7, None, None) == pytest.approx(0.7)
    without = joint_without([1.0, 0.0, 1.0], ["a", "b", "b"], harm)
    rest = Harm(["b"], [False], [2.0], 0.5, -0.1)
    first = Harm(["a"], [True], [0.0], 0.5, -0.1)
    assert without == {"a": joint_score(0.5, 0.0, rest.quiet), "b": joint_score(1.0, 1.0, first.quiet)}
    assert joint_without([1.0], ["a"], harm) == {}


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [0.3, 1.0, 0.1, 0.8]
    without = [(sum(values) - value) / 3 for value in values]
    assert jackknife_error(without) == pytest.approx(mean_by_subject(values, list("abcd"))[1])
    assert jackknife_error(without[:1]) is None
