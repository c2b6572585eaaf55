"""The dictionary as a model of MLflow: a folder that `mlflow.pyfunc.load_model` runs, and the same logged with a run.

There is no pickle in it: the model is data files and the name of the module that reads them.
"""

from pathlib import Path

import numpy as np

from trainer.errors import UserError
from trainer.run_folder import RunFolder
from trainer.tracking.config import OFF, reason, store_uri
from trainer.tracking.description import kept_uri
from trainer.tracking.store import connect


def save_model(folder: Path, data: Path, loader: str, example: np.ndarray, slots: int) -> None:
    """Write a model folder.

    data: folder that is copied into it. loader: module with `_load_pyfunc(path of the copy)`. example: raw activations
    [B, D] fp32, of which the model makes codes [B, slots] fp32.
    """
    import mlflow.pyfunc
    from mlflow.models.signature import ModelSignature
    from mlflow.types import Schema, TensorSpec

    rows = TensorSpec(np.dtype(np.float32), (-1, example.shape[1]))
    codes = TensorSpec(np.dtype(np.float32), (-1, slots))
    mlflow.pyfunc.save_model(
        path=str(folder),
        loader_module=loader,
        data_path=str(data),
        signature=ModelSignature(inputs=Schema([rows]), outputs=Schema([codes])),
        input_example=example,
        pip_requirements=["alignsae"],  # stated, since finding out would run the model in another process
    )


def log_model(run_dir: Path, folder: Path, name: str) -> str:
    """Log a model folder with the MLflow run of a run folder; returns models:/ID, which `load_model` takes.

    Raises UserError where the run was not tracked, or the store fails.
    """
    run_file, uri = RunFolder(run_dir).mlflow_run_id, kept_uri(run_dir)
    if uri == OFF or not run_file.exists():
        raise UserError(f"{run_dir} is in no MLflow store; `alignsae track {run_dir} --uri STORE` enters it")
    try:
        from mlflow.entities import LoggedModelOutput

        client, run_id = connect(uri, run_dir), run_file.read_text().strip()
        run = client.get_run(run_id)
        steps = [metric.step for metric in client.get_metric_history(run_id, "loss")]
        model = client.create_logged_model(run.info.experiment_id, name, run_id, model_type="sparse autoencoder")
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=max(steps, default=0))])
    except Exception as error:
        why = reason(error, store_uri(uri, run_dir))
        raise UserError(f"{folder} is written, but not logged in MLflow ({why})") from error
    return f"models:/{model.model_id}"
