"""Print the numbers of spectrum.json as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VARIANTS = ("plain", "preconditioned")
COLUMNS = ("", "lambda max", "lambda min", "trace", "s.e.", "max/median", "products")


def kappa(condition: Mapping[str, Any]) -> str:
    """Return the condition number in short: its value, or what it is at least."""
    if condition["resolved"] and condition["converged"]:
        return f"{condition['kappa']:.4g}"
    return f">= {condition['kappa_lower_bound']:.4g}"


def _kappa_in_full(condition: Mapping[str, Any]) -> str:
    floor = f"unresolved below {condition['noise_floor']:.1e}"
    if not condition["resolved"]:
        return f"{kappa(condition)}, {floor}"
    note = "" if condition["converged"] else " (not converged)"
    return f"{condition['kappa']:.4g}{note}, certified >= {condition['kappa_lower_bound']:.4g}, {floor}"


def print_table(report: Mapping[str, Any]) -> None:
    """Print one block per checkpoint, one row per variant; what did not converge is marked."""
    for entry in report["checkpoints"]:
        for note in entry["notes"]:
            print(f"note: {note}")
        how = f", all {entry['parameters']} eigenvalues" if entry["plain"]["exact"] else ""
        print(f"{entry['label']}: {entry['parameters']} parameters{how}, loss {_text(entry['loss'])}")
        shown = [variant for variant in VARIANTS if variant in entry]
        rows = [COLUMNS, *(_row(variant, entry[variant]) for variant in shown)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        for name, *cells in rows:
            aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            print("  ".join(["", name.ljust(widths[0]), *aligned]))
        for variant in shown:
            print(f"  kappa of {variant}: {_kappa_in_full(entry[variant]['condition'])}")
            for end in ("largest", "smallest"):
                print(f"  {end} of {variant}: {_eigenvalues(entry[variant][end])}")


def _row(variant: str, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        variant,
        _text(numbers["largest"]["eigenvalues"][0]),
        _text(numbers["smallest"]["eigenvalues"][0]),
        _text(numbers["trace"]["estimate"]),
        _text(numbers["trace"]["std_error"], 2),
        ratio(numbers),
        str(numbers["num_matvecs"]),
    )


def ratio(numbers: Mapping[str, Any]) -> str:
    """Return lambda max / median as text; an estimated one by the range over probes, since it is uncertain."""
    bulk = numbers["bulk"]
    if numbers["exact"]:
        return _text(bulk["ratio"])
    return " to ".join(_text(ratio, 2) for ratio in bulk["ratio_of_probes"])


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
