"""Which kernel a bank gets: names, availability, density and hysteresis; and the build of the compiled operators."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from trainer.assembly import agreed_precision
from trainer.errors import UserError
from trainer.kernels import KernelChoice, native, usable_precision
from trainer.kernels.choice import LEAVE_DENSE, RETURN_TO_DENSE
from trainer.topology import Topology


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native.load.cache_clear()
    yield
    monkeypatch.undo()
    native.load.cache_clear()


def observe(choice: KernelChoice, densities: list[float]) -> None:
    """Show densities of banks of one slot at a step of 1,000 rows."""
    choice.note(torch.tensor([1000.0 * density for density in densities]), 1000)


def test_auto_follows_the_density_of_each_bank_and_does_not_flicker():
    choice = KernelChoice("auto", [1, 1, 1])
    assert choice.names() == ["dense"] * 3
    observe(choice, [0.5, LEAVE_DENSE / 2, (LEAVE_DENSE + RETURN_TO_DENSE) / 2])
    assert choice.names() == ["dense", "sparse", "dense"]
    assert [numbers for _, numbers in choice.runs(0, True)] == [[0], [1], [2]]
    between = (LEAVE_DENSE + RETURN_TO_DENSE) / 2
    observe(choice, [between] * 3)
    assert choice.names() == ["dense", "sparse", "dense"]
    observe(choice, [0.0, RETURN_TO_DENSE * 1.1, 0.0])
    assert choice.names() == ["sparse", "dense", "sparse"]


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_pinned_kernel_stays(name):
    choice = KernelChoice(name, [1, 1])
    for density in (0.0, 1.0):
        observe(choice, [density] * 2)
        assert choice.names() == [name] * 2


def test_unknown_names_and_wrong_devices_are_refused():
    with pytest.raises(UserError, match="'fast' is unknown"):
        KernelChoice("fast", [1])
    with pytest.raises(UserError, match="sparse is for CPU"):
        KernelChoice("sparse", [1], torch.device("cuda"))
    with pytest.raises(UserError, match="kernel=triton cannot run here"):
        KernelChoice("triton", [1], torch.device("cpu"))


def test_without_a_compiler_auto_stays_dense_and_says_so(no_compiler, caplog):
    choice = KernelChoice("auto", [1, 1])
    observe(choice, [0.0, 0.0])
    assert choice.names() == ["dense", "dense"]
    assert sum("every bank stays on the dense kernel" in record.message for record in caplog.records) == 1
    with pytest.raises(UserError, match="compiler"):
        KernelChoice("sparse", [1])


@pytest.mark.slow
def test_a_killed_build_does_not_block_the_next(tmp_path):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    code = "from trainer.kernels import native; native.SOURCES = native.SOURCES[-1:]; print(native.load())"
    command = [sys.executable, "-c", code]  # one of the sources stands for all
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/*.ninja")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    rest = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=900)[0].strip() for p in rest] == ["None", "None"]
    assert len(list(tmp_path.glob("*.so"))) == 1


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_fp32_on_a_processor_that_would_emulate_it(monkeypatch, has_bf16):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("trainer.private.has_avx512_bf16", lambda: has_bf16)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert usable_precision("bf16", cpu) == ("bf16" if has_bf16 else "fp32")
    assert usable_precision("fp32", cpu) == usable_precision("fp32", cuda) == "fp32"
    assert usable_precision("bf16", cuda) == "bf16"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ranks_agree_on_fp32_when_one_would_emulate_bf16(monkeypatch, elsewhere):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("trainer.private.has_avx512_bf16", lambda: True)
    monkeypatch.setattr(Topology, "any_over_world", lambda self, own: own or elsewhere)
    assert agreed_precision("bf16", Topology()) == ("fp32" if elsewhere else "bf16")
