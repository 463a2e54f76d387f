"""Write spectrum.json and spectrum.npz, and read them back."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import scipy
import torch
from command import InputError, write_json, write_npz
from spectra import Arrays, Numbers

from gradcond import __version__

FORMAT = 1  # to be raised when a reader of the old files would misread the new


def write(folder: Path, report: Numbers, arrays: Arrays) -> None:
    """Write both files, each whole or not at all."""
    write_npz(folder / "spectrum.npz", arrays)
    write_json(folder / "spectrum.json", {"format": FORMAT, "versions": versions(), **report})


def versions() -> dict[str, str]:
    """Return the versions of everything that the numbers depend on."""
    modules = {"torch": torch, "numpy": np, "scipy": scipy}
    own = {"gradcond": __version__, "python": platform.python_version()}
    return own | {name: str(module.__version__) for name, module in modules.items()}


def read(folder: Path) -> tuple[Numbers, Arrays]:
    """Return the report and the arrays that an earlier run wrote.

    Raises:
        InputError: if a file is missing, damaged or of another format.
    """
    json_path, npz_path = folder / "spectrum.json", folder / "spectrum.npz"
    for path in (json_path, npz_path):
        if not path.is_file():
            raise InputError(f"no {path}; --redraw needs spectrum.json and spectrum.npz of an earlier run")
    try:
        report = json.loads(json_path.read_text(encoding="utf-8"))
        with np.load(npz_path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:
        raise InputError(f"{folder}: spectrum.json or .npz is damaged ({error}); measure again") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise InputError(f'{json_path} must have "format": {FORMAT}; measure again with this version')
    return report, arrays
