"""`alignsae plan`: its memory and traffic against measurements, and what it prints."""

import argparse
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tools.parsers.plan
from tests.support.commands import ROOT, launch, program, torchrun
from tools import plan
from tools.cli import main
from tools.planning import seconds
from tools.planning.estimate import Estimate
from trainer.dictionary import DictionaryConfig
from trainer.errors import UserError

MEASURE = str(ROOT / "tests" / "strategies" / "measure.py")
SIZES = {"slots": 60000, "width": 256, "bank-slots": 3000, "rows": 64, "concepts": 6}


def estimate(*arguments: Any, **options: Any) -> Estimate:
    """What the plan says of a layout that is possible."""
    found = plan.estimate(*arguments, **options)
    assert found is not None
    return found


def measured(world: int, strategy: str, **sizes: int | str) -> list[dict]:
    """What measure.py prints on each rank."""
    arguments = [MEASURE, "--strategy", strategy]
    for name, value in {**SIZES, **sizes}.items():
        arguments += [f"--{name}", str(value)]
    # Freed tensors go back to the system at once, so that resident memory is what is held.
    env = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = torchrun(world, *arguments) if world > 1 else program("python", *arguments)
    result = launch(command, timeout=900, env=env)
    assert result.code == 0, result.output[-4000:]
    # Ranks share one pipe: two lines may arrive as one.
    return [json.loads(found) for found in re.findall(r'\{"rank".*?\}', result.output)]


def workload(**sizes: int) -> plan.Workload:
    """The sizes of `measured`, as the plan sees them."""
    s = {**SIZES, **sizes}
    return make_workload(s["width"], s["concepts"], 0, DictionaryConfig(s["slots"], s["bank-slots"]), s["rows"])


def make_workload(
    width: int, concepts: int, answers: int, chosen: DictionaryConfig, rows: int, bf16: bool = False
) -> plan.Workload:
    """A workload whose concepts are numbered."""
    return plan.Workload(chosen.form(width, [str(i) for i in range(concepts)], answers), rows, bf16)


@pytest.fixture(scope="module")
def single() -> dict:
    return measured(1, "single")[0]


@pytest.mark.slow
def test_memory_of_one_process_is_within_15_percent(single):
    assert estimate(workload(), "single", 1).total == pytest.approx(single["peak_bytes"], rel=0.15)
    assert estimate(workload(), "single", 1).build == pytest.approx(single["build_bytes"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "dictionary"])
def test_memory_and_traffic_are_within_15_percent(single, strategy):
    """And the bars: on four ranks, ZeRO-3 takes at most 0.40 of the memory of a single process, dictionary 0.30."""
    ranks = measured(4, strategy)
    assert len(ranks) == 4
    peak = max(rank["peak_bytes"] for rank in ranks)
    sent = max(rank["sent_per_step"] for rank in ranks)
    expected = estimate(workload(), strategy, 4, gloo=True)
    assert expected.total == pytest.approx(peak, rel=0.15)
    assert expected.build == pytest.approx(max(rank["build_bytes"] for rank in ranks), rel=0.15)
    assert sum(expected.sent.values()) == pytest.approx(sent, rel=0.15)
    saving = estimate(workload(), strategy, 4, gloo=True, snapshots=True)
    assert saving.snapshot == pytest.approx(max(rank["snapshot_bytes"] for rank in ranks), rel=0.15)
    assert saving.total == expected.total + saving.snapshot
    if strategy in ("zero3", "dictionary"):
        assert peak <= {"zero3": 0.40, "dictionary": 0.30}[strategy] * single["peak_bytes"]
    for rank in ranks if strategy == "zero3" else []:  # the shard and at most two banks, and what is no bank
        assert rank["gathered_elements"] <= 2 * rank["bank_elements"] + workload().shared
        shard = rank["state_bytes"] / 4 / 4
        assert rank["placed_bytes"] <= shard + 2 * 4 * rank["bank_elements"] + 2**20  # no rank ever held all weights


@pytest.mark.slow
def test_dictionary_moves_the_reconstruction_and_little_else():
    """S = 100,006, D = 768, B = 1024, two ranks: the kernel counts at most 1.1 x B x D x 4 bytes in each direction."""
    sizes = {"slots": 100_000, "width": 768, "bank-slots": 8192, "rows": 1024, "steps": 2}
    for rank in measured(2, "dictionary", **sizes, kernel="auto"):
        assert 1024 * 768 * 4 <= rank["sent_per_step"] <= 1.1 * 1024 * 768 * 4
        assert 1024 * 768 * 4 <= rank["received_per_step"] <= 1.1 * 1024 * 768 * 4


WORKLOADS = st.builds(
    make_workload,
    width=st.integers(1, 8192),
    concepts=st.integers(0, 2000),
    answers=st.integers(0, 1000),
    chosen=st.builds(DictionaryConfig, st.integers(1, 2**21), st.integers(2**10, 2**14)),
    rows=st.integers(1, 2**16),
    bf16=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(WORKLOADS, st.sampled_from(["ddp", "zero1", "zero2", "zero3", "dictionary"]), st.integers(1, 9))
def test_more_devices_never_need_more_state_each(work, strategy, power):
    few, many = (plan.estimate(work, strategy, 2**p) for p in (power - 1, power))
    if few is None or many is None:
        assert strategy == "dictionary" and work.form.banks < 2**power
        return
    assert many.weights + many.optimizer <= few.weights + few.optimizer
    assert few.total >= max(few.weights + few.gradients + few.optimizer + few.buffers + few.activations, few.build)


@settings(max_examples=25, deadline=None)
@given(WORKLOADS, st.sampled_from(plan.STRATEGIES), st.integers(2**30, 2**37))
def test_the_smallest_device_count_fits_and_half_of_it_does_not(work, strategy, memory):
    fewest = plan.smallest(work, strategy, memory)
    if fewest is None:
        return
    assert estimate(work, strategy, fewest).total <= memory
    half = plan.estimate(work, strategy, fewest // 2) if fewest > 1 and fewest % 2 == 0 else None
    assert half is None or half.total > memory or fewest == work.form.banks


def test_the_command_prints_every_strategy(capsys, tmp_path):
    out = tmp_path / "plan.json"
    arguments = [
        "--config",
        str(ROOT / "configs" / "large.yaml"),
        "--width",
        "4096",
        "--concepts",
        "100",
        "--devices",
        "64",
    ]
    assert main(["plan", *arguments, "--device-memory", "40GiB", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    for strategy in plan.STRATEGIES:
        assert f"\n{strategy} " in text
    assert {e["strategy"] for e in json.loads(out.read_text())} == set(plan.STRATEGIES) - {"single"}
    assert "1,048,576 free slots in 128 banks" in text and "snapshot (host)" in text


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "--config is missing"),
        (["--scaling", "--device-memory", "80 apples"], "is not a size"),
        (["--scaling", "--devices", "0"], "at least 1"),
        (["--config", "nowhere.yaml"], "cannot be read"),
        (["--config", str(ROOT / "configs" / "large.yaml"), "data.shards=/nowhere"], "--width"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_snapshots_count_on_cpu_ranks_and_where_saves_are_asynchronous(capsys, tmp_path):
    out = tmp_path / "plan.json"
    common = ["--config", str(ROOT / "configs" / "large.yaml"), "--width", "4096", "--json", str(out)]

    def ddp(*arguments: str) -> dict:
        assert main(["plan", *common, *arguments]) == 0
        return next(e for e in json.loads(out.read_text()) if e["strategy"] == "ddp")

    gpu, cpu, waiting = ddp(), ddp("--backend", "gloo"), ddp("--backend", "gloo", "checkpoint.asynchronous=false")
    assert gpu["snapshot"] == cpu["snapshot"] > waiting["snapshot"] == 0
    assert gpu["total"] == waiting["total"] == cpu["total"] - cpu["snapshot"]


def test_moments_in_bf16_take_half_and_cannot_be_sharded_by_zero():
    whole = make_workload(64, 6, 0, DictionaryConfig(4096, 512), 64)
    half = replace(whole, moment=2)
    for strategy in ("ddp", "dictionary"):
        few, many = (estimate(s, strategy, 4, gloo=True, snapshots=True) for s in (half, whole))
        assert 2 * few.optimizer == many.optimizer and few.weights == many.weights
        assert few.snapshot / many.snapshot == pytest.approx(8 / 12)
    assert plan.estimate(half, "zero3", 4) is None and plan.smallest(half, "zero1", 2**40) is None


def test_sizes():
    assert plan.parse_size("80GiB") == 80 * 2**30 and plan.parse_size("512MiB") == 512 * 2**20
    assert plan.human(1536) == "1.50 KiB" and plan.human(0) == "0 B"
    with pytest.raises(UserError):
        plan.parse_size("-1GiB")


def test_scaling_document_holds_the_table_of_the_command(capsys):
    assert main(["plan", "--scaling"]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "scaling.md").read_text()


def test_seconds_follow_from_bytes_and_operations(capsys):
    """The issue of 100,006 slots on one H100, by hand: product 1.26 TFLOP, AdamW 28 bytes a parameter."""
    form = DictionaryConfig(100_000).form(768, [str(i) for i in range(6)], 10)
    work = plan.Workload(form, 8192, True)
    alone = plan.estimate(work, "single", 1)
    assert alone is not None
    device = seconds.DEVICES["h100"]
    each = {kernel.name: kernel for kernel in seconds.kernels(work, "single", 1, 64.0)}
    assert each["encoder product and bits"].operations == pytest.approx(2 * 8192 * 100_000 * 768)
    assert each["AdamW"].bytes == pytest.approx(28 * (work.free() + work.shared))
    found = seconds.step(work, alone, device, 64.0)
    product, adam = 1.258e12 / (0.7 * 989e12), 28 * 153.7e6 / (0.85 * 3.35e12)
    assert found.floor == pytest.approx(product + adam, rel=0.01)
    assert found.sent == 0 and found.uncached > found.total == found.kernels > found.floor
    again = each["pre-activations again, in fp32"]
    entries, width = 8192 * 64.0, 768 * 4
    by_hand = width * 100_000 / (0.85 * 3.35e12) + width * entries / 5.5e12
    assert again.seconds(device) == pytest.approx(by_hand)  # 25 MB of rows, half of the cache holds 26
    # With more rows than the cache holds they come from memory.
    twice = seconds.kernels(plan.Workload(form, 16384, True), "single", 1, 64.0)[3]
    assert twice.seconds(device) == pytest.approx(width * (100_000 + 2 * entries) / (0.85 * 3.35e12))
    # More devices: less to compute each, something to send.
    for strategy in ("ddp", "dictionary", "zero3"):
        many = plan.estimate(work, strategy, 8)
        assert many is not None
        shared = seconds.step(work, many, device, 64.0)
        assert shared.kernels < found.kernels and shared.sent > 0
    arguments = ["--config", str(ROOT / "configs" / "large.yaml"), "--width", "768", "--device", "h100"]
    assert main(["plan", *arguments]) == 0
    assert "| AdamW |" in capsys.readouterr().out
    assert main(["plan", *arguments, "--l0", "0"]) == 2


def test_every_device_of_the_parser_has_figures():
    parser = argparse.ArgumentParser()
    tools.parsers.plan.add_arguments(parser)
    choices = next(action.choices for action in parser._actions if action.dest == "device_name")
    assert set(choices or ()) == set(seconds.DEVICES)
