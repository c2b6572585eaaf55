"""The dictionary: size of banks, initialisation, encode and decode."""

import pytest
import torch

from trainer.dictionary import ConceptDictionary, DictionaryConfig
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
    seen = {}

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
