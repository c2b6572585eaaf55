"""Ratios and tables of what `alignsae bench` measured."""

import itertools
from typing import Any


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """The figures that are compared with bars; only ratios, since times depend on the machine."""
    fast = "triton" if "triton/pretrain" in found["step_s"] else "sparse"
    step, state = found["step_s"], found["state_bytes"]
    pretrain = step[f"{fast}/pretrain"]
    best = found["precision"]
    out = {"step / floor (pretrain)": pretrain / found["floor_s"]}
    for name in ("bf16", "fp32"):
        if f"dense_{name}_step_s" in found:
            out[f"rows/s over dense {name} autograd"] = found[f"dense_{name}_step_s"] / pretrain
    out |= {
        "align / pretrain": step[f"{fast}/align"] / pretrain,
        f"dense kernel / dense {best} autograd, time (half of all slots active)": step["dense/pretrain"]
        / found[f"dense_{best}_step_s"],
    }
    if isinstance(found.get(f"dense_{best}_compiled_step_s"), float):
        out[f"rows/s over dense {best} compiled"] = found[f"dense_{best}_compiled_step_s"] / pretrain
    if "peak_bytes" in found:
        peak = found["peak_bytes"]
        out["peak / state (pretrain)"] = peak[f"{fast}/pretrain"] / state
        out["peak / state (align)"] = peak[f"{fast}/align"] / state
        beyond = max(peak[f"dense_{best}"] - state, 1)
        out[f"dense kernel / dense {best} autograd, memory beyond state"] = (peak["dense/pretrain"] - state) / beyond
    for name, seconds_or_reason in found.get("peers_s", {}).items():
        if not isinstance(seconds_or_reason, str):
            out[f"rows/s over {name}"] = seconds_or_reason / pretrain
    for gate, seconds in itertools.islice(found.get("gates_s", {}).items(), 1, None):
        first = next(iter(found["gates_s"]))
        out[f"pretrain step, gate {gate} over {first}"] = seconds / found["gates_s"][first]
    for axis, points in found.get("sweeps", {}).items():
        stage = "align" if axis == "concepts" else "pretrain"
        for before, after in itertools.pairwise(p for p in points if "skipped" not in p):
            # Against each point's own floor where the floor does not change, which takes out the drift of the machine.
            values = [
                p["step_s"][f"{fast}/{stage}"] / (1 if axis in ("slots", "rows") else p["floor_s"])
                for p in (before, after)
            ]
            name = f"{stage} step, {axis} {before['shapes'][axis]:g} -> {after['shapes'][axis]:g}"
            out[name] = values[1] / values[0]
    return out


def print_tables(found: dict[str, Any]) -> None:
    """Times and ratios for reading."""
    shapes = found["shapes"]
    print(
        f"{found['device']}; B={shapes['rows']} D={shapes['width']} S={shapes['slots'] + shapes['concepts']} "
        f"R={shapes['concepts']} gate {shapes['gate']} mean L0 {found['mean_l0']:.1f}; medians of {found['repeats']}"
    )
    rows = [
        (f"encoder product ({found['precision']})", found["encoder_product_s"]),
        ("fused AdamW", found["adam_s"]),
        ("floor", found["floor_s"]),
    ]
    rows += [(f"step {name}", value) for name, value in found["step_s"].items()]
    rows += [
        (key.removesuffix("_s").replace("_", " "), found[key])
        for key in found
        if key.startswith("dense_") and key.endswith("_s")
    ]
    for name, value in found.get("peers_s", {}).items():
        rows.append((name, value))
    for name, value in rows:
        shown = value if isinstance(value, str) else f"{value:8.4f} s {shapes['rows'] / value:10.0f} rows/s"
        print(f"  {name:32s} {shown}")
    for name, ratios_by_round in found["step_over_floor"].items():
        print(f"  {name} / floor, round by round    {min(ratios_by_round):.2f} to {max(ratios_by_round):.2f}")
    faults = ", ".join(f"{name} {count:.0f}" for name, count in found["page_faults"].items())
    print(f"  page faults of a step            {faults}")
    for name, value in found.get("peak_bytes", {}).items():
        print(f"  peak {name:27s} {value / 1e9:8.3f} GB, {value / found['state_bytes']:.3f} of the state")
    for axis, points in found.get("sweeps", {}).items():
        for point in points:
            print(f"  {axis + format(point['shapes'][axis], ' g'):17s} {_point(point)}")
    for name, value in found["ratios"].items():
        print(f"  {value:7.3f}  {name}")


def _point(point: dict[str, Any]) -> str:
    """One line of a sweep."""
    if "skipped" in point:
        return f"left out: {point['skipped']}"
    steps = [
        f"{name} {value:8.4f} s = {value / point['floor_s']:.2f} floors, {point['shapes']['rows'] / value:.0f} rows/s"
        for name, value in point["step_s"].items()
    ]
    return f"floor {point['floor_s']:8.4f} s, " + ", ".join(steps) + f", mean L0 {point['mean_l0']:.1f}"
