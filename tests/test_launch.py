"""The files of launch/: each is read by the program it is for, and the CPU ones start a run as written."""

import os
import subprocess
from unittest import mock

import jsonschema
import pytest
import torch.distributed.run
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser

from tests.pytorchjob_schema import PYTORCH_JOB
from tests.support.commands import ROOT, launch, program, torchrun
from tests.support.runs import arguments, metrics
from trainer.config import load_config
from trainer.strategies import ParallelConfig

ACCELERATE = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
# Launch file -> what the run's resolved configuration must say.
AS_WRITTEN = {
    "ddp-cpu": ("ddp", 1),
    "zero1-cpu": ("zero1", 1),
    "zero2-cpu": ("zero2", 1),
    "zero3-cpu": ("zero3", 1),
    "dictionary-cpu": ("dictionary", 2),
    "mesh-cpu": ("dictionary", 2),
    "single": ("single", 1),
}
THREE_STEPS = {"stages": [{"name": "pretrain", "steps": 3}]}
FAST = ("dictionary-cpu",)
# Files for GPUs: what the configuration of 8 processes must resolve to (strategy, dictionary ranks, offload).
ON_GPUS = {
    "ddp": ("ddp", 1, False),
    "zero1": ("zero1", 1, False),
    "zero2": ("zero2", 1, False),
    "zero3": ("zero3", 1, False),
    "zero3-offload": ("zero3", 1, True),
    "dictionary": ("dictionary", 8, False),
    "mesh": ("dictionary", 4, False),
}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_every_file(path):
    loaded = load_config_from_file(str(path))  # unknown keys are errors
    assert loaded.num_processes >= 1 and loaded.mixed_precision == "no"
    twin = path.with_name(f"{path.stem}-cpu.yaml")
    if twin.exists():
        ours, theirs = (yaml.safe_load(p.read_text()) for p in (path, twin))
        for settings in (ours, theirs):
            settings.pop("num_processes")
            settings.pop("parallelism_config", None)
        assert ours == theirs


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in AS_WRITTEN])
def test_accelerate_launch_works_as_written(small_data, tmp_path, name):
    argv = arguments(tmp_path, small_data, changes=THREE_STEPS)
    file = f"launch/accelerate/{name}.yaml"
    result = launch(program("accelerate", "launch", "--config_file", file, "-m", "trainer.train", *argv))
    assert result.code == 0, result.output[-4000:]
    resolved = load_config(tmp_path / "run" / "config.yaml", [])
    assert (resolved.parallel.strategy, resolved.parallel.dictionary_ranks) == AS_WRITTEN[name]
    assert len(metrics(tmp_path)) == 3


@pytest.mark.parametrize("name", ON_GPUS)
def test_files_for_gpus_start_what_they_name(monkeypatch, name):
    """Accelerate does all but start the processes: their number and environment lead to the strategy, without a GPU."""
    started = []
    monkeypatch.setattr(torch.distributed.run, "run", lambda args: started.append((args, dict(os.environ))))
    path = ROOT / "launch" / "accelerate" / f"{name}.yaml"
    command = ["--config_file", str(path), "-m", "trainer.train", "--config", "configs/large.yaml"]
    with mock.patch.dict(os.environ):
        launch_command(launch_command_parser().parse_args(command))
    ((args, environment),) = started
    assert int(args.nproc_per_node) == 8 and args.module and args.training_script == "trainer.train"
    with mock.patch.dict(os.environ, environment, clear=True):
        found = ParallelConfig().resolve(8, 16)
    assert (found.strategy, found.dictionary_ranks, found.offload) == ON_GPUS[name]
    assert set(ON_GPUS) == {p.stem for p in ACCELERATE if not p.stem.endswith("-cpu")} - {"single"}


@pytest.mark.slow
def test_torchrun_works_with_the_strategy_on_the_command_line(small_data, tmp_path):
    argv = arguments(tmp_path, small_data, "parallel.strategy=zero3", changes=THREE_STEPS)
    result = launch(torchrun(2, "-m", "trainer.train", *argv))
    assert result.code == 0, result.output[-4000:]
    assert len(metrics(tmp_path)) == 3


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "kubernetes").glob("*.yaml")), ids=lambda path: path.stem)
def test_kubernetes_files_match_the_schema(path):
    job = yaml.safe_load(path.read_text())
    jsonschema.validate(job, PYTORCH_JOB)
    pod = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    mounted = {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    arguments = pod["containers"][0]["args"]
    settings = arguments[arguments.index("--config") + 1 :]
    assert load_config(ROOT / settings[0], settings[1:]).parallel.strategy == "zero3"


def test_the_schema_refuses_a_misspelt_field():
    job = yaml.safe_load((ROOT / "launch" / "kubernetes" / "pytorchjob.yaml").read_text())
    job["spec"]["nProcPerNode"] = job["spec"].pop("nprocPerNode")
    with pytest.raises(jsonschema.ValidationError, match="nProcPerNode"):
        jsonschema.validate(job, PYTORCH_JOB)


def test_the_sbatch_file_is_a_shell_script_with_requeue_and_signal():
    path = ROOT / "launch" / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    directives = [line.split(maxsplit=1)[1] for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--requeue" in directives and "--signal=USR1@120" in directives
