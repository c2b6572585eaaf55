"""On a CUDA device: kernels against the oracle, steps that wait for nothing, and runs of every strategy.

`make gpu` runs them; without a device they are skipped. As many devices as there are take part, up to eight.
"""

import importlib.util
import signal
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)

from tests.kernels.heads_oracle import compare_heads
from tests.kernels.kernel_oracle import Case, assert_same, by_kernel, by_oracle, make_case
from tests.support.commands import launch, start, torchrun
from tools.timing.ours import OurStep
from tools.timing.setting import Setting
from trainer.kernels import KernelChoice, RunKernel

DEVICE = torch.device("cuda")
WORLD = min(torch.cuda.device_count(), 8)
NEEDED = ("omegaconf", "msgspec", "xxhash", "accelerate", "safetensors", "yaml")
SMALL = Setting(rows=512, width=256, slots=20_000, bank_slots=4096, l0=32.0, device="cuda")


def kernel(name: str) -> RunKernel:
    return KernelChoice(name, [1], DEVICE).runs(0, True)[0][0]


def on_device(case: Case) -> Case:
    held = {f.name: getattr(case, f.name) for f in fields(case)}
    moved: dict[str, Any] = {name: t.to(DEVICE) for name, t in held.items() if isinstance(t, torch.Tensor)}
    return replace(case, **moved)


def found(name: str, case: Case, bf16: bool) -> dict[str, torch.Tensor]:
    return {n: t.cpu() for n, t in by_kernel(kernel(name), on_device(case), bf16=bf16).items()}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("threshold", [None, (0.0, 2.0), (50.0, 90.0)], ids=["relu", "thresholds", "out of reach"])
@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 130, 6), (300, 1000, 70), (64, 6, 1500), (257, 129, 0)])
def test_triton_equals_the_oracle(
    shape: tuple[int, int, int], decoder_norm: str, threshold: tuple[float, float] | None, bf16: bool
) -> None:
    case = make_case(*shape, width=96, bias=-1.0, decoder_norm=decoder_norm, threshold=threshold)
    assert_same(found("triton", case, bf16), by_oracle(case), 4e-3 if bf16 else 1e-4 if shape[2] > 100 else 1e-5)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(33, 130, 6), (64, 6, 0)])
def test_trained_thresholds_equal_the_oracle(shape: tuple[int, int, int], bf16: bool) -> None:
    case = make_case(*shape, width=96, threshold=(0.0, 2.0), bandwidth=0.5)
    assert_same(found("triton", case, bf16), by_oracle(case), 4e-3 if bf16 else 1e-5)


@pytest.mark.parametrize("decoder_norm", ["free", "unit"])
def test_dense_equals_the_oracle(decoder_norm: str) -> None:
    case = make_case(130, 300, 6, bias=0.0, decoder_norm=decoder_norm)
    assert_same(found("dense", case, False), by_oracle(case), 2e-5)


@pytest.mark.parametrize(("rows", "concepts", "bf16"), [(1, 1, False), (513, 6, False), (300, 1000, True)])
def test_heads_equal_plain_pytorch(rows: int, concepts: int, bf16: bool) -> None:
    compare_heads(KernelChoice("triton", [1], DEVICE).heads, rows, concepts, bf16, DEVICE)


@pytest.mark.parametrize("width", [64, 768, 2304, 4096])
def test_every_width(width: int) -> None:
    case = make_case(200, 500, 6, width=width, bias=-1.5)
    assert_same(found("triton", case, True), by_oracle(case), 4e-3)


@pytest.mark.parametrize("gate", ["relu", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("align", [False, True])
def test_a_steady_step_waits_for_nothing(align: bool, gate: str) -> None:
    ours = OurStep(replace(SMALL, gate=gate))
    ours.prepare("triton", sparse=True)
    for _ in range(4):
        ours.step(align)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            ours.step(align)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def data(folder: Path) -> Path:
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    from tests.support.data import write_data

    return write_data(folder / "data")


def command(folder: Path, strategy: str, world: int, **changes: Any) -> list[str]:
    from tests.support.runs import arguments

    overrides = [f"parallel.strategy={strategy}", *([] if world == 1 else [f"parallel.dictionary_ranks={world}"])]
    rest = arguments(folder, data(folder), *(overrides if strategy == "dictionary" else overrides[:1]), changes=changes)
    return torchrun(world, "-m", "trainer.train", *rest)


def trained(folder: Path, strategy: str, world: int, **changes: Any) -> dict[int, dict[str, Any]]:
    from tests.support.runs import metrics

    result = launch(command(folder, strategy, world, **changes), timeout=240)
    assert result.code == 0, result.output[-2000:]
    return metrics(folder)


@pytest.mark.parametrize("strategy", ["single", "ddp", "dictionary", "zero1", "zero2", "zero3"])
def test_every_strategy_trains_as_the_cpu_does(tmp_path: Path, strategy: str) -> None:
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the package deepspeed is not installed")
    from tests.support.runs import metrics, train_here

    world = 1 if strategy == "single" else WORLD
    world = min(world, 2) if strategy == "dictionary" else 4 if world > 4 else world  # three banks; four lanes
    lines = trained(tmp_path / "cuda", strategy, world, kernel="auto")
    before = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        assert train_here(tmp_path / "cpu", data(tmp_path / "cpu")) == 0
    finally:
        torch.cuda.is_available = before
    expected = metrics(tmp_path / "cpu")
    first = [expected[step]["loss"] for step in range(1, 6)]
    assert [lines[step]["loss"] for step in range(1, 6)] == pytest.approx(first, rel=1e-3)


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", "single", 1, kernel="auto")
    process = start(command(tmp_path / "killed", "single", 1, kernel="auto"))
    until(lambda: (tmp_path / "killed/run/checkpoints/latest").exists() or process.poll() is not None, 120)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = trained(tmp_path / "killed", "single", 1, kernel="auto")
    last = max(whole)
    assert max(again) == last
    assert again[last]["rows_digest"] == whole[last]["rows_digest"]
    assert again[last]["loss"] == pytest.approx(whole[last]["loss"], rel=1e-4)
