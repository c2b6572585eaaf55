"""The shipped sbatch file on a real SLURM: two nodes train, are pre-empted, requeued, and end as undisturbed ones."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.slurm.slurm_cluster import Cluster, missing_programs
from tests.strategies.curriculum_runs import CURRICULUM
from tests.support.commands import ROOT
from tests.support.runs import merged, write_config
from trainer.checkpoint import load_dictionary

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"SLURM is not installed: {', '.join(missing_programs())} missing"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="munged and slurmd need root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def config(small_data, tmp_path_factory) -> Path:
    changes = {
        "run": {"log_every": 50},
        "data": {"shards": str(small_data), "global_batch": 32, "threads": 0},
        "stages": [{"name": "pretrain", "steps": 600}, {"name": "align", "steps": 600}],
        "checkpoint": {"every": 0},
    }
    return write_config(tmp_path_factory.mktemp("curriculum"), merged(CURRICULUM, changes))


def submit(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """Submit the shipped file to two nodes of one task each; returns the job's number."""
    folder.mkdir()
    exports = f"ALL,PYTHON={sys.executable},PYTHONPATH={ROOT},OMP_NUM_THREADS=1"
    answer = cluster.run(
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gres=none",
        "--time=10",
        f"--export={exports}",
        str(ROOT / "launch" / "slurm" / "train.sbatch"),
        *arguments,
        cwd=folder,
    )
    assert answer, "sbatch refused the file"
    return answer.strip()


def read(log: Path) -> str:
    """A log that tasks are writing: a bar may be cut in the middle of a character."""
    return log.read_text(errors="replace") if log.exists() else ""


def wait_for(cluster: Cluster, job: str, wanted, log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not wanted():
        text = read(log)
        assert time.monotonic() < deadline, f"{cluster.state(job)}\n{text[-4000:]}"
        assert not cluster.state(job).startswith("FAILED"), text[-4000:]
        time.sleep(0.2)


def test_a_preempted_job_is_requeued_and_ends_with_the_same_weights(cluster, config, tmp_path):
    folder = tmp_path / "disturbed"
    job = submit(cluster, folder, str(config), "run.dir=run", "parallel.strategy=zero2")
    log = folder / f"slurm-{job}.log"
    lines = folder / "run" / "metrics.jsonl"
    wait_for(cluster, job, lambda: lines.exists() and len(lines.read_text().splitlines()) >= 3, log)
    cluster.run("scancel", "--signal=USR1", job)
    wait_for(cluster, job, lambda: cluster.state(job) == "COMPLETED 1", log)
    text = read(log)
    assert "attempt 2" in text and "saved, requeueing" in text and "resuming from" in text

    calm = tmp_path / "calm"
    other = submit(cluster, calm, str(config), "run.dir=run", "parallel.strategy=zero2")
    wait_for(cluster, other, lambda: cluster.state(other) == "COMPLETED 0", calm / f"slurm-{other}.log")
    disturbed, undisturbed = (load_dictionary(path / "run")[0].state_dict() for path in (folder, calm))
    for name, tensor in undisturbed.items():
        assert torch.equal(disturbed[name], tensor), name


def test_a_task_that_is_killed_fails_the_job_by_name(cluster, config, tmp_path):
    folder = tmp_path / "killed"
    job = submit(cluster, folder, str(config), "run.dir=run")
    log = folder / f"slurm-{job}.log"
    lines = folder / "run" / "metrics.jsonl"
    wait_for(cluster, job, lambda: lines.exists() and lines.read_text(), log)
    os.kill(process_of_task(job, 1), 9)
    began = time.monotonic()
    while not cluster.state(job).startswith("FAILED"):
        assert time.monotonic() - began < 60, f"{cluster.state(job)}\n{read(log)[-4000:]}"
        time.sleep(0.2)
    assert "task 1" in read(log)


def process_of_task(job: str, task: int) -> int:
    """Pid of the Python process of a task."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"RANK={task}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                wanted <= set((folder / "environ").read_bytes().split(b"\0"))
                and b"trainer.train" in (folder / "cmdline").read_bytes()
            ):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no process of task {task}")
