"""Print the numbers of spectrum.json as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VARIANTS = ("plain", "preconditioned")
COLUMNS = (
    "",
    "lambda max",
    "lambda min",
    "trace",
    "s.e.",
    "kappa",
    "at least",
    "max/median",
    "floor",
    "products",
)


def kappa(condition: Mapping[str, Any]) -> str:
    """Return the condition number as text: a value, what it is at least, or that there is none."""
    if not condition["resolved"]:
        return f"unresolved below {condition['noise_floor']:.1e}"
    if condition["converged"]:
        return f"{condition['kappa']:.4g}"
    return f">= {max(condition['kappa'], condition['kappa_lower_bound']):.4g}"


def print_table(report: Mapping[str, Any]) -> None:
    """Print one block per checkpoint, one row per variant; what did not converge is marked."""
    for entry in report["checkpoints"]:
        for note in entry["notes"]:
            print(f"note: {note}")
        print(f"{entry['label']}: {entry['parameters']} parameters, loss {_text(entry['loss'])}")
        shown = [variant for variant in VARIANTS if variant in entry]
        rows = [COLUMNS, *(_row(variant, entry[variant]) for variant in shown)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        for name, *cells in rows:
            aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            print("  ".join(["", name.ljust(widths[0]), *aligned]))
        for variant in shown:
            for end in ("largest", "smallest"):
                print(f"  {end} of {variant}: {_eigenvalues(entry[variant][end])}")


def _row(variant: str, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    condition = numbers["condition"]
    return (
        variant,
        _text(numbers["largest"]["eigenvalues"][0]),
        _text(numbers["smallest"]["eigenvalues"][0]),
        _text(numbers["trace"]["estimate"]),
        _text(numbers["trace"]["std_error"], 2),
        kappa(condition),
        _text(condition["kappa_lower_bound"]),
        _text(numbers["bulk"]["ratio"], 3),
        _text(condition["noise_floor"], 2),
        str(numbers["num_matvecs"]),
    )


def _eigenvalues(pairs: Mapping[str, Any]) -> str:
    """Eigenvalues, with the residual of those that did not converge."""
    return "  ".join(
        _text(value) if converged else f"{_text(value)} (not converged: within {_text(residual, 2)})"
        for value, residual, converged in zip(
            pairs["eigenvalues"], pairs["residuals"], pairs["converged"], strict=True
        )
    )


def _text(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
