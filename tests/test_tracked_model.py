"""What is measured after training, and the dictionary as a model, in the run's MLflow store."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.language_model import CONCEPTS, WIDTH, tiny_model, tiny_prompts, write_shards
from tools.cli import main
from trainer import load
from trainer.files import write_json
from trainer.run_folder import RunFolder
from trainer.tracking import connect, fill_in
from trainer.train import main as train

pytestmark = pytest.mark.slow  # a new SQLite store of MLflow takes its time

CONFIG = """
data: {global_batch: 12, lanes: 1, threads: 0}
dictionary: {free_slots: 64, bank_slots: 32}
stages: [{name: pretrain, steps: 5}, {name: align, steps: 5}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is tracked in the SQLite file beside it."""
    folder = tmp_path_factory.mktemp("tracked")
    chosen = [p for p in tiny_prompts() if p.split == "train"]
    write_shards(folder / "data", tiny_model(), chosen, 1, "train")
    (folder / "c.yaml").write_text(CONFIG)
    given = [f"data.shards={folder / 'data'}", f"run.dir={folder / 'run'}"]
    assert train(["--config", str(folder / "c.yaml"), *given]) == 0
    return folder / "run"


def metrics(run: Path) -> dict[str, float]:
    """Of the MLflow run."""
    client = connect(None, run)
    return dict(client.get_run(RunFolder(run).mlflow_run_id.read_text().strip()).data.metrics)


def test_what_is_measured_afterwards_belongs_to_the_same_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(name.startswith(("train/", "heldout/", "swap/")) for name in metrics(run))
    assert main(["evaluate", "--run", str(run)]) == 0
    assert "figures added to the MLflow run" in capsys.readouterr().out
    found = metrics(run)
    assert {"train/fvu", "train/l0", "train/dead", "train/slot_accuracy", "train/auroc", "loss"} <= found.keys()
    swap = {"slots": {"best_success": 0.75, "best_alpha": 2}, "mean_difference": {"best_success": None}}
    write_json(run / "swap.json", swap)
    assert fill_in(run).numbers == 2 and fill_in(run).numbers == 0
    assert metrics(run) == {**found, "swap/slots": 0.75, "swap/alpha": 2.0}
    (run / "swap.json").unlink()


def test_the_dictionary_is_a_model_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    out = tmp_path / "model"
    assert main(["export", "--run", str(run), "--out", str(out), "--format", "mlflow", "--log-model"]) == 0
    address = capsys.readouterr().out.split("logged: ")[1].strip()
    client = connect(None, run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    raw = (torch.randn(7, WIDTH) * 3).numpy()
    expected = load(run).encode(torch.from_numpy(raw)).numpy()
    assert (expected > 0).any()
    for source in (str(out), address):
        model = mlflow.pyfunc.load_model(source)
        np.testing.assert_allclose(model.predict(raw), expected, rtol=1e-4, atol=1e-4)
        (inputs,), (codes,) = model.metadata.signature.inputs, model.metadata.signature.outputs
        assert inputs.shape == (-1, WIDTH) and codes.shape == (-1, 64 + len(CONCEPTS))
        assert model.predict(model.input_example).shape == (2, 64 + len(CONCEPTS))
    kept = client.get_run(RunFolder(run).mlflow_run_id.read_text().strip())
    assert [f"models:/{output.model_id}" for output in kept.outputs.model_outputs] == [address]
    assert kept.info.status == "FINISHED" and not [*out.rglob("*.pkl"), *out.rglob("*.pickle")]


def test_a_model_without_a_store_is_said_to_be_written(tiny_run: Path, tmp_path: Path) -> None:
    command = ["export", "--run", str(tiny_run / "aligned"), "--out", str(tmp_path / "m"), "--format", "mlflow"]
    assert main([*command, "--log-model"]) == 2
    assert (tmp_path / "m" / "MLmodel").is_file()
