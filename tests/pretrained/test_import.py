"""`alignsae import`: every format, exactly; what cannot be imported is refused in one line, and nothing is left
behind."""

import json
import shutil
import zipfile

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pretrained import foreign
from tests.pretrained.foreign import SLOTS, WIDTH, computed, gemma_scope, rows, saelens, sparsify, weights
from tests.support.data import write_data
from tests.support.modes import private_files
from tests.support.runs import train_here
from tools.cli import main
from trainer import pretrained
from trainer.checkpoint import load_dictionary
from trainer.dictionary import ConceptDictionary
from trainer.errors import DataError
from trainer.stream import Manifest, ShardSpec, ShardWriter


def imported(source, tmp_path, *more: str) -> ConceptDictionary:
    """The dictionary that the command makes of a source."""
    assert main(["import", str(source), "--out", str(tmp_path / "imported"), *more]) == 0
    assert not list(tmp_path.glob("*.partial"))
    assert not list((tmp_path / "imported").glob("scratch*")) and not private_files(tmp_path / "imported")
    return pretrained.load(tmp_path / "imported")


def described(tmp_path) -> dict:
    """dictionary.json."""
    return json.loads((tmp_path / "imported" / "dictionary.json").read_text())


def assert_computes(dictionary: ConceptDictionary, wanted: tuple[torch.Tensor, torch.Tensor], h: torch.Tensor) -> None:
    """Same support; codes and reconstructions within 1e-5 of their norm."""
    code = dictionary.encode(h)
    assert torch.equal(code > 0, wanted[0] > 0)
    for mine, theirs in ((code, wanted[0]), (dictionary.decode(code), wanted[1])):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("bias_in", [True, False])
@pytest.mark.parametrize("architecture,gate", [("standard", "relu"), ("jumprelu", "jumprelu")])
def test_saelens(tmp_path, architecture, gate, bias_in):
    source = saelens(tmp_path / "sae", architecture, apply_b_dec_to_input=bias_in)
    dictionary = imported(source, tmp_path)
    assert dictionary.form.gate == gate
    threshold = weights()["threshold"] if gate == "jumprelu" else 0.0
    assert_computes(dictionary, computed(rows(), threshold=threshold, bias_in=bias_in), rows())
    facts = described(tmp_path)["facts"]
    assert (facts["model"], facts["hook_point"], facts["architecture"]) == ("none", "layer-01", architecture)
    assert len(facts["files"]["sae_weights.safetensors"]) == 64


def test_saelens_stores_batchtopk_as_jumprelu_with_one_threshold(tmp_path):
    tensors = weights() | {"threshold": torch.full((SLOTS,), 0.8)}
    details = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 7.0}}
    source = saelens(tmp_path / "sae", "jumprelu", tensors=tensors, apply_b_dec_to_input=False, metadata=details)
    dictionary = imported(source, tmp_path)
    assert (dictionary.form.gate, dictionary.form.k) == ("batch_topk", 7)
    assert_computes(dictionary, computed(rows(), threshold=0.8, bias_in=False), rows())


def test_a_factor_on_the_input_is_folded_in_or_asked_for(tmp_path, capsys):
    source = saelens(tmp_path / "sae", normalize_activations="expected_average_only_in")
    assert main(["import", str(source), "--out", str(tmp_path / "none")]) == 2
    assert "no activation_scaler.json holds the factor" in capsys.readouterr().err
    (source / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    assert_computes(imported(source, tmp_path), computed(rows(), bias_in=True, factor=0.25), rows())


@pytest.mark.parametrize("compressed", [False, True])
def test_gemma_scope(tmp_path, compressed):
    source = gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k", compressed)
    dictionary = imported(source, tmp_path)
    assert_computes(dictionary, computed(rows(), threshold=weights()["threshold"], bias_in=False), rows())
    facts = described(tmp_path)["facts"]
    assert (facts["model"], facts["hook_point"]) == ("gemma-2-2b", "blocks.20.hook_resid_post")


def shards(folder, h):
    """Rows as a shard folder."""
    spec = ShardSpec(
        width=h.shape[1],
        dtype="float32",
        concepts=[],
        answers=[],
        model="none",
        hook_point="blocks.3.hook_resid_post",
    )
    with ShardWriter(folder, "train", spec, rows_per_block=16) as writer:
        writer.write(h, torch.full((len(h),), -1), torch.full((len(h),), -1))
    return folder


def test_top_k_gets_the_threshold_of_the_rows(tmp_path, capsys):
    source = sparsify(tmp_path / "layers.3")
    assert main(["import", str(source), "--out", str(tmp_path / "imported")]) == 2
    assert "give a shard folder with --rows" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()
    dictionary = imported(source, tmp_path, "--rows", str(shards(tmp_path / "data", rows())))
    assert (dictionary.form.gate, dictionary.form.k) == ("batch_topk", 5)
    code = dictionary.encode(rows())
    assert float((code > 0).sum()) == 5 * len(rows())
    said = capsys.readouterr().out
    # What the true k largest give, without any of the code under test.
    full, _ = computed(rows(), bias_in=True)
    least = full.topk(5, dim=1).values[:, -1:]
    exact = full * (full >= least)
    left = rows() - (exact @ weights()["W_dec"] + weights()["b_dec"])
    fvu = float(left.square().sum() / (rows() - rows().mean(dim=0)).square().sum())
    assert f"true top k: L0 {float((exact > 0).sum()) / 100:.2f}, FVU {fvu:.4f} on 100 rows" in said
    assert "as imported: L0 5.00" in said
    assert described(tmp_path)["facts"]["hook_point"] == "blocks.3.hook_resid_post"


def test_a_row_with_many_large_entries_does_not_move_the_threshold(tmp_path):
    """The threshold is exact even where one row alone has more entries above it than are looked at to begin with."""
    h = torch.cat([rows(), 6.0 * rows()[:40]])
    dictionary = imported(sparsify(tmp_path / "layers.3", k=2), tmp_path, "--rows", str(shards(tmp_path / "data", h)))
    assert float((dictionary.encode(h) > 0).sum()) == 2 * len(h)


@pytest.mark.parametrize("gate", ["relu", "batch_topk"])
def test_own_runs_and_exports(tmp_path, small_data, gate):
    assert train_here(tmp_path, small_data, f"dictionary.gate={gate}", "dictionary.k=6") == 0
    dictionary, _ = load_dictionary(tmp_path / "run")
    h = dictionary.denormalise(rows() / 10)
    code = dictionary.encode(h)
    wanted = (code, dictionary.decode(code))
    assert 0 < float((code > 0).float().mean()) < 1
    sources = {"run": tmp_path / "run"}
    for layout in ("saelens", "safetensors"):
        sources[layout] = tmp_path / layout
        assert main(["export", "--run", str(tmp_path / "run"), "--out", str(sources[layout]), "--format", layout]) == 0
    for source in sources.values():
        found = imported(source, tmp_path)
        # Concept slots first, as slots like others.
        assert found.form.free_slots == dictionary.slots
        assert_computes(found, wanted, h)
        assert described(tmp_path)["facts"]["concepts"] == dictionary.concept_names
        shutil.rmtree(tmp_path / "imported")


def test_concept_slots_that_sleep_are_left_out(tmp_path, small_data):
    assert train_here(tmp_path, small_data, "stages=[{name: pretrain, epochs: 1}]") == 0
    assert imported(tmp_path / "run", tmp_path).form.free_slots == 40
    assert described(tmp_path)["facts"]["concepts"] == []


def test_from_an_address(tmp_path):
    memory = fsspec.filesystem("memory")
    for path in (saelens(tmp_path / "sae"), gemma_scope(tmp_path / "gemma")):
        memory.put(str(path), f"/{path.name}", recursive=True)
    assert_computes(imported("memory://sae", tmp_path), computed(rows(), bias_in=True), rows())
    shutil.rmtree(tmp_path / "imported")
    found = imported("memory://gemma/params.npz", tmp_path)
    assert_computes(found, computed(rows(), threshold=weights()["threshold"], bias_in=False), rows())


def changed(without: str = "", **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights without one of them, and with others instead."""
    return {name: tensor for name, tensor in (weights() | tensors).items() if name != without}


REFUSED = {
    "architecture": (lambda p: saelens(p, "gated"), "architecture 'gated' cannot be imported"),
    "layer norm": (lambda p: saelens(p, normalize_activations="layer_norm"), "normalize_activations='layer_norm'"),
    "rescale": (lambda p: saelens(p, normalize_activations="constant_norm_rescale"), "'constant_norm_rescale'"),
    "d_sae": (lambda p: saelens(p, d_sae=41), "d_in 12 and d_sae 41"),
    "no threshold": (lambda p: saelens(p, "jumprelu", tensors=changed("threshold")), "no tensor threshold"),
    "shape": (lambda p: saelens(p, tensors=changed(b_enc=torch.zeros(3))), "b_enc has shape (3,)"),
    "nan": (lambda p: saelens(p, tensors=changed(W_dec=torch.full((SLOTS, WIDTH), torch.nan))), "W_dec holds NaN"),
    "integers": (lambda p: saelens(p, tensors=changed(b_enc=torch.zeros(SLOTS).int())), "b_enc is I32"),
    "transcoder": (lambda p: sparsify(p, transcode=True), "is a transcoder"),
    "groupmax": (lambda p: sparsify(p, activation="groupmax"), "'groupmax' cannot be imported"),
    "k": (lambda p: sparsify(p, k=0), "k is 0"),
}  # fmt: skip


def assert_refused(argument, tmp_path, capsys, reason: str, *more: str) -> None:
    """One line, exit code 2, nothing left."""
    before = sorted(tmp_path.iterdir())
    assert main(["import", str(argument), "--out", str(tmp_path / "imported"), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path, capsys, case):
    make, reason = REFUSED[case]
    assert_refused(make(tmp_path / "source"), tmp_path, capsys, reason)


def test_folders_that_are_none(tmp_path, capsys):
    assert_refused(tmp_path / "nowhere", tmp_path, capsys, "no such folder")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", tmp_path, capsys, "no dictionary of a known format")
    (tmp_path / "empty" / "ae.pt").write_bytes(b"\x80\x04")
    assert_refused(tmp_path / "empty", tmp_path, capsys, "ae.pt is a pickle")
    assert_refused(tmp_path / "empty" / "ae.pt", tmp_path, capsys, "a pickle can run code")
    sparsify(tmp_path / "all" / "layers.3")
    assert_refused(tmp_path / "all", tmp_path, capsys, "its folders do: layers.3")
    assert_refused("pipe:cat {name}", tmp_path, capsys, "pipe:")
    assert_refused("memory://nothing-there", tmp_path, capsys, "holds none of")


def test_rows_of_another_width(tmp_path, capsys):
    source, data = sparsify(tmp_path / "layers.3"), shards(tmp_path / "data", torch.randn(50, 7))
    assert_refused(source, tmp_path, capsys, "has width 7, the dictionary 12", "--rows", str(data))


def damage_npz(path, **members: bytes) -> None:
    """Put members of these bytes into an archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, payload in members.items():
            archive.writestr(f"{name}.npy", payload)


def test_npz_is_read_with_suspicion(tmp_path, capsys):
    folder = gemma_scope(tmp_path / "gemma")
    path = folder / "params.npz"
    np.savez(path, W_enc=np.array([{"a": 1}], dtype=object))
    assert_refused(folder, tmp_path, capsys, "cannot be read as npz")
    header = (
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117)
        + b"\n"
    )
    damage_npz(path, W_enc=header)
    assert_refused(folder, tmp_path, capsys, "does not have the bytes of its shape")
    path.write_bytes(b"PK")
    assert_refused(folder, tmp_path, capsys, "cannot be read as npz")


def test_a_damaged_import_is_noticed(tmp_path):
    imported(saelens(tmp_path / "sae"), tmp_path)
    bank = tmp_path / "imported" / "bank-00000.safetensors"
    tensors = load_file(bank)
    tensors["W_enc"][0, 0] += 1
    save_file(tensors, bank)
    with pytest.raises(DataError, match="differs from its hash"):
        pretrained.load(tmp_path / "imported")
    bank.unlink()
    with pytest.raises(DataError, match=r"bank-00000.safetensors is not there"):
        pretrained.load(tmp_path / "imported")
    (tmp_path / "imported" / "dictionary.json").write_text('{"schema": 1, "width": "x"}')
    with pytest.raises(DataError, match="import it again"):
        pretrained.load(tmp_path / "imported")


def test_a_bank_is_read_without_the_rest(tmp_path):
    """Slots come a few at a time, whatever the banks of the folder are."""
    with_many = foreign.weights(slots=20_000)
    source = saelens(tmp_path / "sae", "jumprelu", tensors=with_many, apply_b_dec_to_input=False)
    imported(source, tmp_path)
    opened = pretrained.Imported(tmp_path / "imported")
    assert opened.form.banks == 3
    part = opened.bank(8000, 17_000)
    torch.testing.assert_close(part.W_enc, with_many["W_enc"].T[8000:17_000])
    torch.testing.assert_close(part.threshold, with_many["threshold"][8000:17_000])


def test_names_can_be_given(tmp_path):
    imported(saelens(tmp_path / "sae"), tmp_path, "--model", "gpt2", "--hook-point", "blocks.1.hook_resid_post")
    facts = described(tmp_path)["facts"]
    assert (facts["model"], facts["hook_point"]) == ("gpt2", "blocks.1.hook_resid_post")


def test_data_of_the_small_run(tmp_path):
    """--rows of any dictionary says what it does there."""
    data = write_data(tmp_path / "data")
    assert Manifest.load(str(data)).width == WIDTH
    imported(saelens(tmp_path / "sae"), tmp_path, "--rows", str(data))
    measured = described(tmp_path)["measured"]["threshold"]
    assert measured["rows"] == 496
    assert 0 < measured["l0"] < SLOTS
