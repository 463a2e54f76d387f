"""Write spectrum.json and spectrum.npz, and read them back."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import scipy
import torch
from command import InputError, read_json, write_json, write_npz
from spectra import Arrays, Numbers

from gradcond import __version__

FORMAT = 1  # to be raised when a reader of the old files would misread the new


def write(folder: Path, report: Numbers, arrays: Arrays) -> None:
    """Write both files, each whole or not at all."""
    write_npz(folder / "spectrum.npz", arrays)
    write_json(folder / "spectrum.json", FORMAT, {"versions": versions(), **report})


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
    report, path = read_json(folder / "spectrum.json", FORMAT), folder / "spectrum.npz"
    if not path.is_file():
        raise InputError(f"no {path}; --redraw needs that of an earlier run")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:
        raise InputError(f"{path} is damaged ({error}); measure again") from error
    return report, arrays
