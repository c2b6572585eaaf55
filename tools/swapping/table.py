"""The table of all methods, for the terminal and for documents."""

from collections.abc import Mapping
from typing import Any

FORMS = {"always": "always", "when": "where read"}
COLUMNS = ("method", "edit", "alpha", "success", "isolation", "prompt KL", "text KL", "fluency", "joint", "suppressed")


def methods_of(swap: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What swap.json says of each method, by name, the slots first."""
    return {name: swap[name] for name in ("slots", "mean_difference")} | swap.get("rivals", {})


def cells(swap: Mapping[str, Any]) -> list[list[str]]:
    """One row of COLUMNS for each form of each method."""
    rows = []
    for name, part in methods_of(swap).items():
        for which, what in FORMS.items():
            form = part["forms"][which]
            shares = [with_error(form["success"], form["standard_error"])]
            shares += [number(form[key]) for key in ("isolation", "prompt_kl", "text_kl", "fluency")]
            shares += [with_error(form["joint"], form["joint_standard_error"])]
            suppressed = number(part["suppression"]["success"]) if which == "always" else ""
            rows.append([name, what, f"{part['best_alpha']:g}", *shares, suppressed])
    return rows


def aligned(rows: list[list[str]]) -> str:
    """COLUMNS and rows in columns of equal width."""
    columns = [*zip(COLUMNS, *rows, strict=True)]
    padded = [
        [cell.ljust(width) if i < 2 else cell.rjust(width) for cell in column]
        for i, (column, width) in enumerate((column, max(map(len, column))) for column in columns)
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def summary(swap: Mapping[str, Any]) -> str:
    """What is compared beside the swaps themselves: the table, and how far the slots lead each method."""
    beside = swap["bystanders"]
    lines = [f"beside: {beside['questions']} other questions, {beside['texts']} texts", aligned(cells(swap))]
    for name, part in methods_of(swap).items():
        if name != "slots":
            lead = part["slots_over"]["always"]["success"]
            lines.append(f"slots over {name}: {with_error(lead['difference'], lead['standard_error'])}")
        if lead := part.get("over_mean_difference"):
            lead = lead["always"]["success"]
            lines.append(f"{name} over mean_difference: {with_error(lead['difference'], lead['standard_error'])}")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def with_error(value: float, error: float | None) -> str:
    """A figure and, where there is one, its standard error in brackets."""
    return number(value) if error is None else f"{value:.3f} ({error:.3f})"
