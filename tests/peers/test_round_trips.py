"""Dictionaries of the real sae-lens and eai-sparsify: imported, exported, and loaded again by them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.data import write_data
from tests.support.runs import metrics, train_here
from tools.cli import main
from trainer import pretrained
from trainer.checkpoint import load_dictionary
from trainer.pretrained.calibration import sample
from trainer.stream import ShardSpec, ShardWriter


def shards(folder: Path, rows: Tensor) -> Path:
    """Rows as a shard folder."""
    spec = ShardSpec(
        width=rows.shape[1],
        dtype="float32",
        concepts=[],
        answers=[],
        model="gpt2",
        hook_point="blocks.1.hook_resid_post",
    )
    with ShardWriter(folder, "train", spec, rows_per_block=64) as writer:
        none = torch.full((len(rows),), -1)
        writer.write(rows, none, none)
    return folder


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Codes and reconstructions within 1e-5 of their norm, and the same slots active."""
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5
    assert torch.equal(found[0] > 0, wanted[0] > 0)
    assert 0 < float((wanted[0] > 0).float().mean()) < 0.9


@pytest.mark.parametrize("bias_in", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "batchtopk"])
def test_saelens_there_and_back(peers, rows, tmp_path, kind, bias_in):
    source = peers.make(kind, tmp_path / "sae", apply_b_dec_to_input=bias_in)
    wanted = peers.run(kind, source, rows)
    assert main(["import", str(source), "--out", str(tmp_path / "imported")]) == 0
    dictionary = pretrained.load(tmp_path / "imported")
    gates = {"standard": "relu", "jumprelu": "jumprelu", "batchtopk": "batch_topk"}
    assert dictionary.form.gate == gates[kind]
    if kind == "batchtopk":
        assert dictionary.form.k == 6
    code = dictionary.encode(rows)
    assert_same((code, dictionary.decode(code)), wanted)
    assert main(["export", "--run", str(tmp_path / "imported"), "--out", str(tmp_path / "back")]) == 0
    assert_same(peers.run("saelens", tmp_path / "back", rows), wanted)


@pytest.mark.parametrize(
    "kind,settings", [("topk", {}), ("topk", {"rescale_acts_by_decoder_norm": True}), ("sparsify", {})]
)
def test_top_k_becomes_one_threshold(peers, rows, tmp_path, capsys, kind, settings):
    source = peers.make(kind, tmp_path / "layers.1", **settings)
    data = shards(tmp_path / "data", rows)
    code, reconstruction = peers.run(kind, source, rows)
    assert main(["import", str(source), "--out", str(tmp_path / "imported"), "--rows", str(data)]) == 0
    said = capsys.readouterr().out
    dictionary = pretrained.load(tmp_path / "imported")
    mine = dictionary.encode(rows)
    # As many entries as the true top k, at values that agree wherever both are active.
    assert float((mine > 0).sum(dim=1).float().mean()) == 5.0
    both = (mine > 0) & (code > 0)
    assert float(both.float().sum() / (code > 0).float().sum()) > 0.7
    torch.testing.assert_close(mine[both], code[both], rtol=1e-4, atol=1e-4)

    def fvu(found: Tensor) -> float:
        return float((rows - found).square().sum() / (rows - rows.mean(dim=0)).square().sum())

    assert f"true top k: L0 5.00, FVU {fvu(reconstruction):.4f} on 200 rows" in said
    assert f"as imported: L0 5.00, FVU {fvu(dictionary.decode(mine)):.4f} on 200 rows" in said


def test_an_own_run_is_loaded_by_saelens(peers, rows, tmp_path):
    """A dictionary that this trainer trained, with concept slots and each kind of gate, exported and loaded there."""
    data = write_data(tmp_path / "data", dtype="float32")
    for gate in ("relu", "batch_topk"):
        folder = tmp_path / gate
        assert train_here(folder, data, f"dictionary.gate={gate}", "dictionary.k=4") == 0
        assert main(["export", "--run", str(folder / "run"), "--out", str(folder / "sae")]) == 0
        dictionary, _ = load_dictionary(folder / "run")
        code = dictionary.encode(rows)
        found = peers.run("saelens", folder / "sae", rows)
        assert_same(found, (code, dictionary.decode(code)))


def test_a_trained_batch_topk_is_aligned_with_its_slots_held(peers, tmp_path):
    """The row of the issue: SAELens trains it, it is imported, and concepts are named on top of it without touching
    it."""

    data = write_data(tmp_path / "data", dtype="float32")
    rows = sample(str(data))
    save_file({"rows": rows}, tmp_path / "rows.safetensors")
    peers.ask("train", tmp_path / "rows.safetensors", tmp_path / "sae")
    assert main(["import", str(tmp_path / "sae"), "--out", str(tmp_path / "imported"), "--rows", str(data)]) == 0
    chosen = [
        f"dictionary.start_from={tmp_path / 'imported'}",
        "dictionary.freeze=free",
        "stages=[{name: align, epochs: 6}]",
        "optim.lr=0.01",
    ]
    assert train_here(tmp_path, data, *chosen) == 0
    lines = metrics(tmp_path)
    assert lines[max(lines)]["binding"] > 0.8
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "named")]) == 0
    free_before, _ = peers.run("saelens", tmp_path / "sae", rows)
    code, _ = peers.run("saelens", tmp_path / "named", rows)
    # The published slots are where they were, behind the named ones, with the codes that they had.
    torch.testing.assert_close(code[:, 3:], free_before, rtol=1e-4, atol=1e-4)
    assert load_file(tmp_path / "named" / "sae_weights.safetensors")["W_dec"].shape == (43, 12)
