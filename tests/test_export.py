"""Exported weights act on raw activations as the dictionary does."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.language_model import CONCEPTS, WIDTH, random_dictionary
from tools.cli import main
from tools.export import compare
from trainer.checkpoint import load_dictionary
from trainer.errors import UserError
from trainer.pretrained import fold


@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
@pytest.mark.parametrize("mean_norm", [1.0, 300.0])
def test_folded_weights_take_raw_activations(decoder_norm, mean_norm):
    dictionary = random_dictionary(decoder_norm=decoder_norm)
    dictionary.set_normalisation((mean_norm * torch.randn(WIDTH)).tolist(), 2.5)
    h = dictionary.denormalise(torch.randn(20, WIDTH))
    folded = fold(dictionary)
    code = torch.relu(h @ folded["W_enc"].T + folded["b_enc"])
    tolerance = 1e-6 * mean_norm + 1e-5
    torch.testing.assert_close(code, dictionary.encode(h), rtol=1e-4, atol=10 * tolerance)
    decoded = code @ folded["W_dec"] + folded["b_dec"]
    torch.testing.assert_close(decoded, dictionary.decode(dictionary.encode(h)), rtol=1e-4, atol=100 * tolerance)


@pytest.mark.parametrize("layout", ["saelens", "safetensors"])
def test_exported_files_hold_the_trained_dictionary(tiny_run, tmp_path, layout):
    out = tmp_path / "out"
    assert main(["export", "--run", str(tiny_run / "aligned"), "--out", str(out), "--format", layout]) == 0
    dictionary, manifest = load_dictionary(tiny_run / "aligned")
    named = json.loads((out / "concepts.json").read_text())
    assert named["concepts"] == CONCEPTS
    assert named["trained_on"] == manifest.digest
    assert not list(tmp_path.glob("*.partial"))
    h = torch.randn(9, WIDTH)
    if layout == "safetensors":
        w = load_file(out / "dictionary.safetensors")
        code = torch.relu(h @ w["W_enc"].T + w["b_enc"])
    else:
        # What a SAELens standard SAE computes from this file: x @ W_enc + b_enc, with b_dec left out of the input.
        config, w = json.loads((out / "cfg.json").read_text()), load_file(out / "sae_weights.safetensors")
        assert {k: v.shape for k, v in w.items()} == {
            "W_enc": (WIDTH, 67),
            "b_enc": (67,),
            "W_dec": (67, WIDTH),
            "b_dec": (WIDTH,),
        }
        assert config["architecture"] == "standard"
        assert config["apply_b_dec_to_input"] is False
        assert (config["d_in"], config["d_sae"], config["normalize_activations"]) == (WIDTH, 67, "none")
        assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
        code = torch.relu(h @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(code, dictionary.encode(h), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(code @ w["W_dec"] + w["b_dec"], dictionary.decode(code), rtol=1e-4, atol=1e-4)


def test_reading_back_finds_a_changed_weight(tiny_run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", "--run", str(tiny_run / "aligned"), "--out", str(out)]) == 0
    dictionary, _ = load_dictionary(tiny_run / "aligned")
    assert compare(dictionary, out) < 1e-5
    weights = load_file(out / "sae_weights.safetensors")
    weights["b_dec"][3] += 0.1
    save_file(weights, out / "sae_weights.safetensors")
    with pytest.raises(UserError, match="differ from the dictionary"):
        compare(dictionary, out)


def test_an_existing_folder_is_not_overwritten(tiny_run, tmp_path, capsys):
    assert main(["export", "--run", str(tiny_run / "aligned"), "--out", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["export", "--run", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
