"""Exported weights act on raw activations as the dictionary does."""

import json
import shutil

import fsspec
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.stream.faulty_server import HubHandler, http_server
from tests.support.hub import ModelHub
from tests.support.language_model import CONCEPTS, WIDTH, random_dictionary
from tests.support.modes import private_files
from tools.cli import main
from tools.export import compare
from trainer import load
from trainer.checkpoint import load_dictionary
from trainer.errors import UserError
from trainer.files import write_json
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


def test_runs_shards_and_exports_are_readable_as_the_umask_has_it(tiny_run, tmp_path):
    assert {"lm", "data", "aligned"} <= {path.name for path in tiny_run.iterdir()}
    command = ["export", "--run", str(tiny_run / "aligned"), "--out", str(tmp_path / "out"), "--format", "safetensors"]
    assert main(command) == 0
    assert private_files(tiny_run / "data") == private_files(tiny_run / "aligned") == private_files(tmp_path) == []


@pytest.mark.parametrize("layout", ["saelens", "safetensors", "huggingface"])
def test_exported_files_hold_the_trained_dictionary(tiny_run, tmp_path, layout):
    out = tmp_path / "out"
    assert main(["export", "--run", str(tiny_run / "aligned"), "--out", str(out), "--format", layout]) == 0
    dictionary, manifest = load_dictionary(tiny_run / "aligned")
    named = json.loads((out / "concepts.json").read_text())
    assert named["concepts"] == CONCEPTS
    assert named["trained_on"] == manifest.digest
    assert named["token_position"] == "last prompt token"
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


def test_a_card_says_what_the_run_measured(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run / "aligned", run)
    heldout = {
        "rows": 12,
        "reconstruction": {"fvu": 0.0625, "l0": 3.5, "dead": None},
        "binding": {"slot_accuracy": 1.0},
    }
    write_json(run / "evaluation.json", {"heldout": heldout, "loss_recovered": {"recovered_over_mean": 0.875}})
    write_json(run / "swap.json", {"split": "heldout", "pairs": 7, "slots": {"best_success": 0.5}})
    out, command = tmp_path / "out", ["export", "--run", str(run), "--format", "huggingface"]
    assert main([*command, "--out", str(out), "--license", "apache-2.0"]) == 0
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "saelens"
    gains = load(run).gains
    assert f"| 0 | city | {gains['city']:.4g} |" in card
    for figure in ("0.0625", "0.875", "| 0.5 |", "67 slots", "blocks.1.hook\\_resid\\_post", 'load("hf://OWNER/NAME")'):
        assert figure in card, figure
    assert "dead" not in card
    assert main([*command, "--out", str(tmp_path / "b"), "--license", "MIT: x"]) == 2
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "c"), "--license", "mit"]) == 2
    assert "--format huggingface" in capsys.readouterr().err


def test_an_export_is_loaded_from_a_hub(tiny_run, tmp_path, monkeypatch, online):
    command = ["export", "--run", str(tiny_run / "aligned"), "--out", str(tmp_path / "d"), "--format", "huggingface"]
    assert main(command) == 0
    with http_server(tmp_path, kind=HubHandler) as (server, _, _):
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server})
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        found = load("hf://datasets/me/acts/d")
        fsspec.get_filesystem_class("hf").clear_instance_cache()
    with http_server(tmp_path) as (server, _, _):
        other = load(f"{server}/d")
        with pytest.raises(UserError, match="holds none of"):
            load(f"{server}/nothing")
    run, h = load(tiny_run / "aligned"), torch.randn(5, WIDTH)
    for loaded in (found, other):
        assert loaded.concepts == CONCEPTS and loaded.gains == run.gains and loaded.hook_point == run.hook_point
        torch.testing.assert_close(loaded.encode(h), run.encode(h), rtol=1e-4, atol=1e-4)


def test_an_export_is_pushed_to_a_hub_and_loaded_back(tiny_run, tmp_path, monkeypatch, capsys, online):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    command = ["export", "--run", str(tiny_run / "aligned"), "--format", "huggingface"]
    with http_server(tmp_path / "hub", kind=ModelHub) as (server, _, seen):
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server})
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        assert main([*command, "--out", str(tmp_path / "d"), "--push-to-hub", "me/dict"]) == 0
        found = load("hf://me/dict")
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        assert f"pushed: {server}/me/dict" in capsys.readouterr().out
        assert {p.name for p in (tmp_path / "hub/me/dict").iterdir()} >= {p.name for p in (tmp_path / "d").iterdir()}
        made = next(json.loads(line) for line in seen if line.startswith("{"))
        assert made["name"] == "dict" and (made.get("private") or made.get("visibility") == "private")
        assert main([*command, "--out", str(tmp_path / "e"), "--push-to-hub", "me/other"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "is written, but the hub did not take it" in said and "hf_secret" not in said
    assert 'load("hf://me/dict")' in (tmp_path / "d" / "README.md").read_text() and (tmp_path / "e").is_dir()
    h = torch.randn(5, WIDTH)
    torch.testing.assert_close(found.encode(h), load(tiny_run / "aligned").encode(h), rtol=1e-4, atol=1e-4)
    for wrong in (["--push-to-hub", "a/b/c"], ["--public"], ["--push-to-hub", "me/dict", "--format", "saelens"]):
        assert main([*command, "--out", str(tmp_path / "f"), *wrong]) == 2
    assert not (tmp_path / "f").exists()
