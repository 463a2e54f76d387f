"""Read the metrics of a run: metrics.csv in its folder, one row per evaluation.

The columns are seed, step, train_loss, train_accuracy, test_accuracy, in any order; more are ignored.
Accuracies are fractions, test_accuracy may be empty, and "nan" or "inf" is what a diverged run writes.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from command import InputError

QUANTITIES = ("train_loss", "train_accuracy", "test_accuracy")
COLUMNS = ("seed", "step", *QUANTITIES)

Curves = dict[str, np.ndarray]  # "steps" (t,), the other keys (seeds, t)


def load_run(folder: Path, *, smooth: int = 1) -> Curves:
    """Return the curves of every seed on the union of their steps.

    Between its own evaluations a seed is interpolated; outside them, and where it is not finite, it is NaN.

    Args:
        folder: holds metrics.csv.
        smooth: average over this many evaluations, the present one and those before it.

    Raises:
        InputError: if the file is missing, lacks a column, has no rows or holds what is not a number.
    """
    rows = _read_rows(folder)
    steps = np.unique(rows["step"])
    curves: Curves = {"steps": steps}
    for name in QUANTITIES:
        curves[name] = np.stack(
            [_on_steps(rows, name, rows["seed"] == seed, steps, smooth) for seed in np.unique(rows["seed"])]
        )
    return curves


def _read_rows(folder: Path) -> dict[str, np.ndarray]:
    path = folder / "metrics.csv"
    if not folder.is_dir():
        raise InputError(f"expected a folder with metrics.csv, but there is no folder {folder}; check the name")
    if not path.is_file():
        raise InputError(f"{folder} holds no metrics.csv; expected one with the columns {','.join(COLUMNS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8 ({error.reason}); save it again as such") from error
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(
            f"{path} lacks the column {', '.join(missing)}; its first line must name {','.join(COLUMNS)}"
        )
    rows = [{name: _number(row, name, path, reader.line_num) for name in COLUMNS} for row in reader]
    if not rows:
        raise InputError(f"{path} has a header and no rows; expected one row per evaluation")
    return {name: np.array([row[name] for row in rows]) for name in COLUMNS}


def _number(row: dict[str, str | None], name: str, path: Path, line: int) -> float:
    text = (row[name] or "").strip()
    if not text and name == "test_accuracy":
        return np.nan
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{path}, line {line}: {name} must be a number, got {text!r}; mend the row") from None
    if name in ("seed", "step") and not np.isfinite(value):
        raise InputError(f"{path}, line {line}: {name} must be finite, got {text!r}; mend it")
    if name.endswith("accuracy") and not (np.isnan(value) or 0 <= value <= 1):
        raise InputError(
            f"{path}, line {line}: {name} must be a fraction in 0..1, got {text}; divide percentages by 100"
        )
    return value


def _on_steps(
    rows: dict[str, np.ndarray], name: str, own: np.ndarray, steps: np.ndarray, smooth: int
) -> np.ndarray:
    if name == "test_accuracy":
        own = own & ~np.isnan(rows[name])
    if not own.any():
        return np.full(steps.shape, np.nan)
    order = np.argsort(rows["step"][own], kind="stable")
    values = rows[name][own][order]
    values = np.where(np.isfinite(values), values, np.nan)
    starts = np.maximum(np.arange(len(values)) + 1 - smooth, 0)
    values = np.array([values[start : end + 1].mean() for end, start in enumerate(starts)])
    return np.interp(steps, rows["step"][own][order], values, left=np.nan, right=np.nan)
