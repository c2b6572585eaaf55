"""Swaps and steering: edits against their formulas, and a model whose answers a swap provably decides."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.support.language_model import (
    ANSWERS,
    CONCEPTS,
    PEOPLE,
    WIDTH,
    exact_dictionary,
    random_dictionary,
    tiny_model,
    tiny_prompts,
    tiny_tokenizer,
    words,
)
from trainer.analysis.interventions import (
    Swap,
    answer_loss,
    answer_sets,
    generate_edited,
    loss_recovered,
    score_swaps,
    swap_pairs,
)
from trainer.analysis.rivals import MeanDifference, Slots, TrainingRows
from trainer.dictionary import ConceptDictionary, DictionaryConfig
from trainer.errors import UserError
from trainer.language_model import EditableModel, Prompt, hook_layer

LAYER = 1  # the last block: what is written there alone decides the next token


def writing_dictionary() -> ConceptDictionary:
    """Slot r is always active and writes the unembedding of the word `rome`, `art` or `acme`, scaled far above h."""
    dictionary = ConceptDictionary(DictionaryConfig(4, 4).form(WIDTH, CONCEPTS))
    unembedding = tiny_model().lm_head.weight
    with torch.no_grad():
        dictionary.concepts.b_enc.fill_(1)
        for slot, word in enumerate(("rome", "art", "acme")):
            direction = unembedding[words().index(word)]
            dictionary.concepts.W_dec[slot] = 100 * direction / direction.norm()
    return dictionary


def test_pairs_are_spread_evenly_and_drawn_by_seed():
    pairs = swap_pairs(tiny_prompts(), CONCEPTS, split="heldout", pairs=12, seed=0)
    assert set(Counter((p.source, p.target) for p in pairs).values()) == {2}
    assert len({(p.prompt, p.target) for p in pairs}) == 12
    assert all("which" in p.prompt for p in pairs)
    assert pairs == swap_pairs(tiny_prompts(), CONCEPTS, split="heldout", pairs=12, seed=0)
    assert pairs != swap_pairs(tiny_prompts(), CONCEPTS, split="heldout", pairs=12, seed=1)
    for p in pairs:
        person = PEOPLE.index(p.prompt.split()[2])
        assert p.source_answer == ANSWERS[CONCEPTS[p.source]][person]
        assert p.target_answer == ANSWERS[CONCEPTS[p.target]][person]


def test_all_pairs_when_fewer_exist_than_asked():
    assert len(swap_pairs(tiny_prompts(), CONCEPTS, split=None, pairs=10_000, seed=0)) == 2 * 4 * 3 * 2


def test_a_pair_with_equal_answers_is_no_swap():
    prompts = [Prompt("a", "rome", "city", subject="x"), Prompt("b", "rome", "work", subject="x")]
    with pytest.raises(UserError, match="nothing to swap"):
        swap_pairs(prompts, CONCEPTS, split=None, pairs=5, seed=0)


def test_prompts_without_subject_are_refused():
    with pytest.raises(UserError, match="--split"):
        swap_pairs([Prompt("a", "rome", "city")], CONCEPTS, split=None, pairs=5, seed=0)


@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
def test_slot_swap_writes_back_the_changed_code(decoder_norm):
    dictionary = random_dictionary(decoder_norm=decoder_norm)
    h = torch.randn(4, WIDTH) * 2
    source, target, strength = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 0, 1]), torch.tensor([2.0, 3.0, 4.0])
    z = dictionary.encode(h)
    swapped = z.clone()
    for row in range(4):
        swapped[row, source[row]] = 0
        swapped[row, target[row]] = strength[target[row]]
    decoded = dictionary.decode(swapped)
    torch.testing.assert_close(
        Slots(dictionary, range(3), strength / 2, "replace").swap(source, target, 2.0)(h), decoded, rtol=1e-4, atol=1e-4
    )
    expected = h + decoded - dictionary.decode(z)
    torch.testing.assert_close(
        Slots(dictionary, range(3), strength / 2).swap(source, target, 2.0)(h), expected, rtol=1e-4, atol=1e-4
    )
    z[torch.arange(4), source] = 0
    silent = h + dictionary.decode(z) - dictionary.decode(dictionary.encode(h))
    torch.testing.assert_close(Slots(dictionary, range(3), strength).suppress(source)(h), silent, rtol=1e-4, atol=1e-4)


def test_mean_difference_formula():
    means, h = torch.randn(3, WIDTH), torch.randn(2, WIDTH)
    method = MeanDifference(TrainingRows(means, torch.eye(3, dtype=torch.bool)))
    edit = method.swap(torch.tensor([0, 2]), torch.tensor([1, 0]), 1.5)
    torch.testing.assert_close(edit(h), h + 1.5 * torch.stack([means[1] - means[0], means[0] - means[2]]))


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_each_row_gets_its_own_swap(batch_size):
    dictionary = writing_dictionary()
    pairs = swap_pairs(tiny_prompts(), CONCEPTS, split="heldout", pairs=24, seed=0)
    # Strength 1 leaves the other always-active slot at 1 too: 2 makes the target win.
    method = Slots(dictionary, range(3), torch.ones(3))
    editable = EditableModel(tiny_model(), tiny_tokenizer(), LAYER, batch_size)
    texts = generate_edited(editable, pairs, lambda s, t: method.swap(s, t, 2.0), max_new_tokens=1)
    assert texts == [("rome", "art", "acme")[p.target] for p in pairs]
    score = score_swaps(pairs, texts, answer_sets(tiny_prompts(), CONCEPTS))
    assert score.success == sum(p.target_answer in ("rome", "art", "acme") for p in pairs) / 24
    assert score.category_kept == 1
    assert score.category_kept_of_failures == 1


def test_kinds_of_answers():
    sets = answer_sets(tiny_prompts(), CONCEPTS)
    assert sets[2] == {"acme", "zeta"}
    swap = Swap("p", 0, 1, "rome", "art")
    score = score_swaps([swap] * 4, ["art", "law", "rome", "art law"], sets)
    assert score.kinds == ["target_answer", "target_category", "source_answer", "other"]
    assert (score.success, score.category_kept, score.category_kept_of_failures) == (0.25, 0.5, pytest.approx(1 / 3))
    assert score_swaps([swap], ["art"], sets).category_kept_of_failures is None


def test_answer_loss_is_the_plain_cross_entropy():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [Prompt("Q where ann city", "rome art", "city"), Prompt("Q bob", "law", "major")]
    expected = []
    for p in prompts:
        ids = torch.tensor([tokenizer(f"{p.prompt} {p.answer}")["input_ids"]])
        start = len(tokenizer(p.prompt)["input_ids"])
        logits = model(ids).logits[0, start - 1 : -1]
        expected += cross_entropy(logits, ids[0, start:], reduction="none").tolist()
    assert answer_loss(EditableModel(model, tokenizer, LAYER), prompts) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_exact_reconstruction_recovers_the_whole_loss():
    found = loss_recovered(EditableModel(tiny_model(), tiny_tokenizer(), 0), tiny_prompts(), exact_dictionary())
    assert found["recovered_over_zero"] == pytest.approx(1, abs=1e-4)
    assert found["cross_entropy_zero"] != pytest.approx(found["cross_entropy_original"], abs=1e-3)
    assert found["cross_entropy_mean"] == pytest.approx(found["cross_entropy_zero"])  # this dictionary's mean is 0


def test_hook_layer():
    assert hook_layer("blocks.11.hook_resid_post") == 11
    with pytest.raises(UserError, match="hook_resid_post"):
        hook_layer("blocks.3.hook_mlp_out")
