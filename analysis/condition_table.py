"""Print the numbers of condition.json as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectrum_table import ratio


def print_table(report: Mapping[str, Any]) -> None:
    """Print one table per checkpoint: a row for all parameters, one per layer, and one for its output units."""
    for entry in report["checkpoints"]:
        for note in entry["notes"]:
            print(f"note: {note}")
        print(f"{entry['label']}: {entry['parameters']} parameters, loss {entry['loss']:.4g}")
        variants = entry["variants"]
        rows = [("", "parameters", *variants, "corr(input)")]
        for block in entry["blocks"]:
            cells = [told(block["kappa"][variant]) for variant in variants]
            floor = block["input_correlation"]
            rows.append((title(block), str(block["parameters"]), *cells, told(floor) if floor else "-"))
            rows.append(("  max/median", "", *(ratio(block["kappa"][variant]) for variant in variants), ""))
            if block["units"]:
                spans = [_span(block["units"]["kappa"][variant]) for variant in variants]
                rows.append((f"  {_units(block['units'])}", "", *spans, ""))
        _print_aligned(rows)
    print("kappa = max|lambda| / min|lambda| over what is not zero; of output units smallest / median / largest")
    print("corr(input): kappa of the correlation matrix of the layer's inputs, the floor of BNP;")
    print("             where there is no bias, of what BNP leaves of their second moments")


def title(block: Mapping[str, Any]) -> str:
    """Name a block and its type."""
    return " ".join(part for part in (block["name"], block["kind"]) if part)


def told(condition: Mapping[str, Any]) -> str:
    """Return kappa as text; where it is not known, what it exceeds and below what nothing can be told."""
    if condition["resolved"] and condition["converged"]:
        return f"{condition['kappa']:.4g}"
    if condition["noise_floor"] == 0:
        return "zero"  # the matrix
    why = "not converged" if condition["resolved"] else f"unresolved below {condition['noise_floor']:.1e}"
    return f"> {condition['kappa_lower_bound']:.4g}, {why}"


def _units(units: Mapping[str, Any]) -> str:
    measured, count = len(units["measured"]), units["count"]
    which = f"{count}" if measured == count else f"{measured} of {count}"
    return f"{which} output unit{'' if count == 1 else 's'}"


def _span(unit: Mapping[str, Any]) -> str:
    """Smallest, median and largest of the units; each a bound where what it depends on is not known."""
    if unit["zero"] == len(unit["kappa"]):
        return "zero"
    kinds = [unit[kind] for kind in ("min", "median", "max")]
    texts = [f"{'' if low == high else '> '}{low:.4g}" for low, high in kinds]
    floors = [floor for floor, known in zip(unit["noise_floor"], unit["resolved"], strict=True) if not known]
    why = f", unresolved below {max(floors):.1e}" if any(floors) else ""
    zero = f" ({unit['zero']} zero)" if unit["zero"] else ""
    return (texts[0] if len(unit["kappa"]) == 1 else " / ".join(texts)) + why + zero


def _print_aligned(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join(["", name.ljust(widths[0]), *aligned]).rstrip())
