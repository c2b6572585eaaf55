"""What `accelerate launch` was told is obeyed or refused, never ignored."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser

from trainer.config import Config
from trainer.errors import UserError
from trainer.inputs import taken_over
from trainer.strategies import LaunchFile, launch_file

ROOT = Path(__file__).parents[2]
FILES = ROOT / "launch" / "accelerate"


def environment(monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, str]:
    """What accelerate gives to the processes that it would start, without starting them."""
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(torch.distributed.run, "run", lambda args: seen.append(dict(os.environ)))
    monkeypatch.setattr("accelerate.commands.launch.simple_launcher", lambda args: seen.append(simple(args)))
    with mock.patch.dict(os.environ):
        launch_command(launch_command_parser().parse_args([*options, "-m", "trainer.train"]))
    return seen[0]


def simple(args) -> dict[str, str]:
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    return prepare_simple_launcher_cmd_env(args)[1]


def read(monkeypatch: pytest.MonkeyPatch, *options: str) -> LaunchFile:
    """launch_file as a started process sees it."""
    found = environment(monkeypatch, *options)
    with mock.patch.dict(os.environ, found, clear=True):
        return launch_file()


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_of_this_repository_change_no_number(path: Path, monkeypatch) -> None:
    found = read(monkeypatch, "--config_file", str(path))
    assert (found.precision, found.accumulate, found.clip, found.cpu) == ("", None, None, False)
    config = Config()
    assert taken_over(config, found) is config


ZERO = ("--config_file", str(FILES / "zero2-cpu.yaml"))
DDP = ("--config_file", str(FILES / "ddp-cpu.yaml"))


@pytest.mark.parametrize(
    "options,words",
    [
        ((*DDP, "--mixed_precision", "fp16"), "mixed_precision=fp16"),
        ((*DDP, "--dynamo_backend", "inductor"), "dynamo_backend=inductor"),
        (("--use_fsdp", "--num_processes", "2"), "FSDP"),
        (("--use_megatron_lm", "--num_processes", "2", "--multi_gpu"), "Megatron"),
        ((*ZERO, "--offload_param_device", "cpu"), "offload_param_device=cpu"),
        ((*ZERO, "--offload_optimizer_device", "nvme"), "offload_optimizer_device=nvme"),
        (
            (*ZERO, "--deepspeed_config_file", str(ROOT / "launch" / "deepspeed" / "zero2.json")),
            "deepspeed_config_file",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_use_here_is_refused(options, words: str, monkeypatch) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(monkeypatch, *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["DP_SHARD", "CP", "SP"])
def test_parts_of_a_mesh_that_have_no_use_here(part: str, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{part}_SIZE", "2")
    with pytest.raises(UserError, match=f"parallelism_config_{part.lower()}_size=2"):
        launch_file()


def test_numbers_are_taken_over_where_the_configuration_leaves_the_default(monkeypatch) -> None:
    found = read(monkeypatch, *ZERO, "--gradient_accumulation_steps", "4", "--gradient_clipping", "0.5")
    assert (found.accumulate, found.clip) == (4, 0.5)
    config = Config()
    new = taken_over(config, found)
    assert (new.optim.accumulate, new.optim.clip) == (4, 0.5) and config.optim.accumulate == 1
    config.optim.accumulate = 4
    assert taken_over(config, found).optim.accumulate == 4
    config.optim.accumulate = 2
    with pytest.raises(UserError, match=r"gradient_accumulation_steps=4 .* optim.accumulate=2"):
        taken_over(config, found)


def test_precision_is_that_of_the_configuration(monkeypatch) -> None:
    found = read(monkeypatch, *DDP, "--mixed_precision", "bf16")
    config = Config()
    assert config.run.precision == "bf16" and taken_over(config, found) is config
    config.run.precision = "fp32"
    with pytest.raises(UserError, match=r"mixed_precision=bf16 .* run\.precision=fp32"):
        taken_over(config, found)


def test_a_launch_without_gpus_is_noticed(monkeypatch) -> None:
    assert read(monkeypatch, "--cpu", "--num_processes", "1").cpu
    assert not read(monkeypatch, "--num_processes", "1").cpu


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_launcher_that_counts_in_words(name: str, monkeypatch) -> None:
    from trainer.topology import launched_world

    monkeypatch.setenv(name, "two")
    with pytest.raises(UserError, match=f"{name}='two'"):
        launched_world()
