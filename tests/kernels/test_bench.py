"""The bench command at toy sizes: every figure is there, and the density is the one asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.cli import main
from tools.timing.ours import OurStep
from tools.timing.setting import Setting


def test_quick_bench_writes_every_figure(tmp_path, capsys):
    file = tmp_path / "bench.json"
    more = ["--json", str(file), "--sweep-l0", "8", "32", "--gates", "relu", "jumprelu"]
    code = main(["bench", "--quick", "--repeats", "1", "--no-memory", *more])
    assert code == 0
    found = json.loads(file.read_text())
    for key in ("floor_s", "encoder_product_s", "adam_s", "dense_fp32_step_s", "rows_per_s"):
        assert found[key] > 0, key
    assert found[f"dense_{found['precision']}_step_s"] > 0
    assert (found["precision"] == "bf16") == ("dense_bf16_step_s" in found)
    assert {"device", "shapes", "state_bytes", "mean_l0", "ratios"} <= set(found)
    assert {"sparse/pretrain", "sparse/align", "dense/pretrain", "dense/align"} <= set(found["step_s"])
    assert found["floor_s"] == pytest.approx(found["encoder_product_s"] + found["adam_s"])
    low, high = found["sweeps"]["l0"]
    assert low["mean_l0"] < high["mean_l0"]
    shown = capsys.readouterr().out
    assert "step / floor (pretrain)" in shown and "gate jumprelu over relu" in shown


def test_sweeps_show_how_cost_grows_and_leave_out_what_does_not_fit(tmp_path, capsys):
    file = tmp_path / "bench.json"
    sweeps = ["--sweep-slots", "300", "600", "9000000000", "--sweep-rows", "8", "16", "--sweep-concepts", "1", "30"]
    assert main(["bench", "--quick", "--repeats", "1", "--no-memory", "--json", str(file), *sweeps]) == 0
    found = json.loads(file.read_text())
    assert ["skipped" in point for point in found["sweeps"]["slots"]] == [False, False, True]
    shown = capsys.readouterr().out
    for line in ("slots 300 -> 600", "rows 8 -> 16", "concepts 1 -> 30", "left out: needs about"):
        assert line in shown


def test_a_setting_that_does_not_fit_is_refused(capsys):
    assert main(["bench", "--slots", "9000000000", "--no-memory"]) == 2
    assert "GB are free" in capsys.readouterr().err


def test_a_compiler_that_fails_is_reported(monkeypatch, capsys):
    def broken(function):
        def call(*_):
            raise RuntimeError("no compiler at hand")

        return call

    monkeypatch.setattr("torch.compile", broken)
    assert main(["bench", "--quick", "--repeats", "1", "--no-memory", "--compile"]) == 0
    assert "no compiler at hand" in capsys.readouterr().out


@pytest.mark.parametrize("gate", ["relu", "batch_topk", "jumprelu"])
def test_the_bias_or_the_threshold_sets_the_density(gate):
    ours = OurStep(Setting(rows=256, width=32, slots=1000, bank_slots=300, l0=20.0, gate=gate))
    ours.prepare("dense", sparse=True)
    for _ in range(3):
        ours.step(align=False)
        assert ours.l0 == pytest.approx(20.0, rel=0.2)
    ours.prepare("dense", sparse=False)
    ours.step(align=False)
    assert ours.l0 == pytest.approx(500.0, rel=0.1)


def test_peers_need_an_interpreter(capsys):
    assert main(["bench", "--quick", "--peers"]) == 2
    assert "--peers-python" in capsys.readouterr().err


def test_an_interpreter_without_the_peers_says_so(tmp_path):
    """peers.py reports what it could not time instead of failing."""
    setting = {
        "width": 8,
        "slots": 32,
        "rows": 4,
        "l0": 4.0,
        "device": "cpu",
        "threads": 1,
        "repeats": 1,
        "clock": "perf_counter",
        "precisions": ["bf16", "fp32"],
    }
    script = str(Path(__file__).parents[2] / "tools" / "timing" / "peers.py")
    done = subprocess.run([sys.executable, script, json.dumps(setting)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {"saelens_bf16", "saelens_fp32", "sparsify_topk_bf16"} <= set(found)
    assert all("ModuleNotFoundError" in reason for reason in found.values())
