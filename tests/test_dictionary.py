"""The dictionary: size of banks, initialisation, encode and decode."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.dictionary import GATES, ConceptDictionary, DictionaryConfig, SlotBank
from trainer.dictionary.normalisation import denormalise, fold, fold_output, unfold, unfold_output
from trainer.errors import UserError


def test_banks_are_equal_but_for_the_last():
    assert DictionaryConfig(20, 8).bank_sizes == [8, 8, 4]
    assert DictionaryConfig(16, 8).bank_sizes == [8, 8]
    assert DictionaryConfig(3, 8).bank_sizes == [3]


@pytest.mark.parametrize("initial_l0,expected", [(None, 64), (16, 16), (2048, 1024)])
def test_rows_activate_as_many_slots_as_asked_for(initial_l0, expected):
    dictionary = ConceptDictionary(DictionaryConfig(2048, 512).form(64), initial_l0=initial_l0)
    x = torch.nn.functional.normalize(torch.randn(256, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    assert (dictionary.encode(x) > 0).sum(dim=1).float().mean() == pytest.approx(expected, rel=0.1)


def test_a_bank_starts_alike_wherever_it_lives():
    whole = ConceptDictionary(DictionaryConfig(20, 8).form(8, ["a"]), seed=3)
    part = ConceptDictionary(DictionaryConfig(20, 8).form(8, ["a"]), seed=3, owned=[2])
    assert list(part.units()) == ["concepts", "output", "bank-00002"]
    torch.testing.assert_close(part.banks["00002"].W_enc, whole.banks["00002"].W_enc, rtol=0, atol=0)


def test_units_are_handed_out_one_by_one_before_the_next_is_made():
    seen: dict[str, torch.nn.Module] = {}

    def on_unit(name, unit):
        assert all(p.numel() == 0 for earlier in seen.values() for p in earlier.parameters())
        seen[name] = unit
        for parameter in unit.parameters():
            parameter.data = parameter.data.new_empty(0)  # as an engine that shards does

    dictionary = ConceptDictionary(DictionaryConfig(20, 8).form(8, ["a"], 2), owned=[0, 2], on_unit=on_unit)
    assert seen == dictionary.units()
    assert [bank.slots for bank in dictionary.free_banks()] == [8, 4]


@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
def test_decode_is_linear_in_the_code_and_undoes_the_normalisation(decoder_norm):
    dictionary = ConceptDictionary(DictionaryConfig(20, 8, decoder_norm=decoder_norm).form(8, ["a", "b"]))
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(torch.randn_like(parameter))
    dictionary.set_normalisation([1.0] * 8, 3.0)
    z = dictionary.encode(torch.randn(5, 8))
    assert z.shape == (5, dictionary.slots)
    zero = dictionary.decode(torch.zeros_like(z))
    torch.testing.assert_close(zero, (dictionary.output.b_dec * 3.0 + 1.0).expand(5, -1).detach())
    torch.testing.assert_close(dictionary.decode(2 * z) - zero, 2 * (dictionary.decode(z) - zero))
    unit = dictionary.decode(torch.eye(dictionary.slots)[5:6]) - zero[:1]
    norm = 3.0 if decoder_norm == "unit" else 3.0 * float(next(dictionary.free_banks()).W_dec[3].norm())
    assert float(unit.norm()) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        DictionaryConfig(0),
        DictionaryConfig(4, 0),
        DictionaryConfig(decoder_norm="l2"),
        DictionaryConfig(4, initial_l0=5),
    ],
)
def test_impossible_sizes_are_refused(config):
    with pytest.raises(UserError, match="dictionary"):
        config.validate()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    mean_norm=st.floats(0.0, 1e4),
    scale=st.floats(1e-3, 1e4),
    decoder_norm=st.sampled_from(["free", "unit"]),
    gate=st.sampled_from(sorted(GATES)),
)
def test_fold_and_unfold_are_inverses(seed, mean_norm, scale, decoder_norm, gate):
    """In values and in what they compute: codes of raw activations are those of normalised ones."""
    g = torch.Generator().manual_seed(seed)
    bank = SlotBank(7, 5, gate=gate, decoder_norm=decoder_norm, generator=g)
    with torch.no_grad():
        bank.b_enc.normal_(generator=g)
    direction = torch.randn(5, generator=g)
    mean, factor = mean_norm * direction / direction.norm(), torch.tensor(scale)
    weights = bank.weights()
    folded = fold(weights, mean, factor)
    back = unfold(folded, mean, factor)
    size = 1.0 + mean_norm / scale  # what the bias takes up, and rounds by
    torch.testing.assert_close(back.W_enc, weights.W_enc, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back.b_enc, weights.b_enc, rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(back.decoder(), weights.decoder(), rtol=1e-5, atol=1e-6)
    x = torch.randn(11, 5, generator=g)
    h = denormalise(x, mean, factor)
    torch.testing.assert_close(folded.pre_activations(h), weights.pre_activations(x), rtol=1e-3, atol=1e-4 * size)
    torch.testing.assert_close(
        folded.decode(weights.encode(x)), weights.decode(weights.encode(x)) * factor, rtol=1e-4, atol=1e-4 * scale
    )
    b_dec = torch.randn(5, generator=g)
    again = unfold_output(fold_output(b_dec, mean, factor), mean, factor)
    torch.testing.assert_close(again, b_dec, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("gate", sorted(GATES))
@pytest.mark.parametrize("concepts,answers", [([], 0), (["a", "b"], 0), (["a"], 3)])
def test_the_form_knows_every_parameter_of_every_unit(gate, concepts, answers):
    """What a checkpoint must hold, a plan counts and an engine sizes its buffers by comes from the form alone."""
    form = DictionaryConfig(20, 8, gate=gate, value_hidden=4).form(7, concepts, answers)
    units = ConceptDictionary(form).units()
    assert list(units) == form.units()
    for name, unit in units.items():
        assert {key: tuple(p.shape) for key, p in unit.named_parameters()} == form.shapes(name)


def test_the_threshold_follows_the_count_of_active_entries():
    bank = SlotBank(6, 16, gate="batch_topk")
    theta = bank.get_buffer("theta")
    start = float(theta)
    for l0, grows in ((40.0, True), (20.0, False), (10.0, None)):
        before = float(theta)
        bank.gate.follow({"theta": theta}, torch.tensor(l0), 20.0)
        assert (float(theta) > before, float(theta) < before) == (grows is True, grows is None)
        assert abs(math.log(float(theta) / before)) <= 0.2 + 1e-6
    threshold = bank.weights().threshold
    assert start > 0 and threshold is not None and torch.equal(threshold, theta.expand(6))
