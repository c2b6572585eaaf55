"""What `alignsae bench` does; its arguments and its help are in tools/parsers."""

import argparse
import json
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools.parsers.bench import AXES
from tools.timing.baselines import DenseStep, EncoderProduct
from tools.timing.memory import peak_growth
from tools.timing.ours import FloorAdamW, OurStep
from tools.timing.report import print_tables, ratios
from tools.timing.rounds import Rounds, Subject, Subjects
from tools.timing.setting import Setting
from trainer.allocator import keep_freed_memory
from trainer.errors import UserError
from trainer.kernels import usable_precision

# What one measurement of all subjects holds at a time: training states, and fp32 [B, S] blocks of the dense baseline.
DENSE_COPIES, DENSE_BLOCKS = 2, 5


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON."""
    if args.peers and not args.peers_python:
        raise UserError(
            "--peers needs --peers-python, the interpreter of an environment with sae-lens and eai-sparsify"
        )
    for name in ("width", "slots", "bank_slots", "rows", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.cpu_time:
        if args.device != "cpu" or args.threads > 1:
            raise UserError("--cpu-time works with --device cpu and --threads 1")
        args.threads = 1
    keep_freed_memory()  # as training does
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = (args.rows, args.width, args.slots, args.bank_slots, args.concepts)
    setting = Setting(*sizes, l0=args.l0, device=args.device, gate=args.gate)
    if args.quick:
        setting = replace(setting, rows=64, width=64, slots=2_000, bank_slots=512, l0=16.0)
        args.repeats = min(args.repeats, 2)

    rounds = Rounds(args.repeats, time.process_time if args.cpu_time else time.perf_counter)
    if refusal := setting.refuse(DENSE_COPIES + args.compile, DENSE_BLOCKS):
        raise UserError(f"the setting {describe(setting)} {refusal}")
    peaks = {}
    if not args.no_memory:  # before anything large lives here
        fast = fast_kernel(setting)
        kinds = [f"{fast}/pretrain", f"{fast}/align", "dense/pretrain", f"dense_{precisions(setting)[0]}"]
        peaks = {kind: peak_growth(kind, setting) for kind in kinds}
    gates = gate_figures(setting, args.gates, rounds)
    found = base_figures(setting, rounds, args.compile) | {"gates_s": gates}
    if peaks:
        found["peak_bytes"] = peaks
    if args.peers:
        found["peers_s"] = peer_figures(setting, args.peers_python, rounds)
    found["sweeps"] = {
        axis: [sweep_point(replace(setting, **{axis: value}), rounds) for value in getattr(args, f"sweep_{axis}")]
        for axis in AXES
        if getattr(args, f"sweep_{axis}")
    }
    found["ratios"] = ratios(found)
    print_tables(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def precisions(setting: Setting) -> list[str]:
    """What dense steps are timed in: bf16 (left out on a CPU that emulates it, where it takes minutes) and fp32."""
    return list(dict.fromkeys([usable_precision("bf16", torch.device(setting.device)), "fp32"]))


def fast_kernel(setting: Setting) -> str:
    """The kernel that `auto` uses on this device for banks with few active slots."""
    return "triton" if setting.device.startswith("cuda") else "sparse"


def our_subjects(ours: OurStep, kernels: list[str]) -> Subjects:
    """kernel/stage -> one step. The dense kernel is timed at the density of initialisation, where it is in use."""

    def subject(kernel: str, align: bool) -> Subject:
        return Subject(lambda: ours.step(align), lambda: ours.prepare(kernel, sparse=kernel != "dense"))

    return {
        f"{kernel}/{stage}": subject(kernel, stage == "align") for kernel in kernels for stage in ("pretrain", "align")
    }


def floor_subjects(setting: Setting, ours: OurStep) -> Subjects:
    """The parts of the floor."""
    ways, adam = EncoderProduct(setting).ways, FloorAdamW(ours)
    return {
        **{f"product {i}": Subject(way) for i, way in enumerate(ways)},
        "adam": Subject(adam.run, adam.prepare),
    }


def light_figures(setting: Setting, rounds: Rounds, ours: OurStep) -> dict[str, Any]:
    """Our step and its floor, taking turns."""
    fast = fast_kernel(setting)
    found = rounds.measure({**floor_subjects(setting, ours), **our_subjects(ours, [fast])}, setting.device)
    ours.step(align=False)  # for its mean L0, of free slots alone
    product = min((found[name] for name in found if name.startswith("product")), key=lambda timed: timed.median)
    adam, steps = found["adam"], {name: timed for name, timed in found.items() if "/" in name}
    floors = [p + a for p, a in zip(product.seconds, adam.seconds, strict=True)]
    return {
        "shapes": asdict(setting),
        "precision": precisions(setting)[0],
        "encoder_product_s": product.median,
        "adam_s": adam.median,
        "floor_s": product.median + adam.median,
        "step_s": {name: timed.median for name, timed in steps.items()},
        "step_over_floor": {
            name: [s / f for s, f in zip(timed.seconds, floors, strict=True)] for name, timed in steps.items()
        },
        "page_faults": {name: statistics.median(timed.faults) for name, timed in steps.items()},
        "mean_l0": ours.l0,
    }


def gate_figures(setting: Setting, gates: list[str], rounds: Rounds) -> dict[str, float]:
    """Median seconds of our step with each of these gates, taking turns."""
    fast, subjects = fast_kernel(setting), {}
    if refusal := setting.refuse(len(gates), 1):
        raise UserError(f"--gates: {describe(setting)} {refusal}")
    for gate in gates:
        ours = OurStep(replace(setting, gate=gate))
        subjects[gate] = Subject(partial(ours.step, False), partial(ours.prepare, fast, sparse=True))
    return {gate: timed.median for gate, timed in rounds.measure(subjects, setting.device).items()}


def base_figures(setting: Setting, rounds: Rounds, compiled: bool) -> dict[str, Any]:
    """Floor, dense baselines and our step on one setting."""
    ours = OurStep(setting)
    figures = light_figures(setting, rounds, ours)
    # Apart: a step that gives gigabytes back to the system slows down for seconds what runs next.
    dense = DenseStep(setting)
    heavy = our_subjects(ours, ["dense"])
    for precision in precisions(setting):
        heavy[f"dense_{precision}"] = Subject(partial(dense.step, precision), dense.drop_gradients)
    reason, best = None, precisions(setting)[0]
    if compiled:
        compiled_step = DenseStep(setting, compiled=True)
        try:  # torch.compile works where it finds a compiler that it can use
            compiled_step.step(best)
            heavy[f"dense_{best}_compiled"] = Subject(lambda: compiled_step.step(best))
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    found = rounds.measure(heavy, setting.device)
    for name, timed in found.items():
        if "/" in name:
            figures["step_s"][name] = timed.median
            figures["page_faults"][name] = statistics.median(timed.faults)
        else:
            figures[f"{name}_step_s"] = timed.median
    if reason is not None:
        figures[f"dense_{best}_compiled_step_s"] = reason
    return figures | {
        "device": device_name(setting.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": rounds.repeats,
        "clock": rounds.clock.__name__,
        "rows_per_s": setting.rows / figures["step_s"][f"{fast_kernel(setting)}/pretrain"],
        "state_bytes": setting.state_bytes,
    }


def sweep_point(setting: Setting, rounds: Rounds) -> dict[str, Any]:
    """Our step and its floor at one setting, or why it was left out."""
    if refusal := setting.refuse(1, 1):
        return {"shapes": asdict(setting), "skipped": refusal}
    return light_figures(setting, rounds, OurStep(setting))


def peer_figures(setting: Setting, python: str, rounds: Rounds) -> dict[str, Any]:
    """Median seconds per step of other trainers, or why one could not be timed."""
    threads, clock = torch.get_num_threads(), rounds.clock.__name__
    how = {"threads": threads, "repeats": rounds.repeats, "clock": clock, "precisions": precisions(setting)}
    command = [python, str(Path(__file__).with_name("timing") / "peers.py"), json.dumps(asdict(setting) | how)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--peers-python {python} cannot be run ({error.strerror})") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"--peers-python {python} failed: {lines[-1]}")
    times = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: t if isinstance(t, str) else statistics.median(t) for name, t in times.items()}


def describe(setting: Setting) -> str:
    """Its sizes in words."""
    return f"S={setting.slots + setting.concepts} D={setting.width} B={setting.rows}"


def device_name(device: str) -> str:
    """The device in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"
