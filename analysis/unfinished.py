"""Keep what a long run has measured, so that a killed one goes on where it was.

Each result is written to DIR/unfinished/KEY/VARIANT-NAME.pt as soon as it is known, whole or not at all. KEY is a
digest of everything the result depends on: settings, versions, problem file, checkpoint, the loss on the data. The
same command, run again, reads what it finds there; every estimate is seeded, so the outcome is that of one
uninterrupted run. A run that ends well removes the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from command import InputError, replacing

from gradcond import curvature

FOLDER = "unfinished"
Result = TypeVar("Result")


class Unfinished:
    """The results of one checkpoint, on disk.

    Args:
        folder: where the run writes to.
        *parts: bytes, or what JSON can hold, that the results depend on.
    """

    def __init__(self, folder: Path, *parts: Any) -> None:
        digest = hashlib.sha256()
        for part in parts:
            own = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
            digest.update(hashlib.sha256(own).digest())
        self.key = digest.hexdigest()
        self.folder = folder / FOLDER / self.key[:16]
        self.found = 0  # results read, not measured

    def __call__(self, variant: str, name: str, measure: Callable[[], Result]) -> Result:
        """Return the result of this variant and name: the one on disk, or that of `measure`, which is then kept.

        Raises:
            InputError: if the file on disk cannot be read.
        """
        path = self.folder / f"{variant}-{name}.pt"
        if not path.exists():
            result = measure()
            with replacing(path) as file:
                torch.save(_encode(result), file)
            return result
        try:
            result = _decode(torch.load(path, weights_only=True))
        except Exception as error:
            raise InputError(
                f"{path} of an earlier run is damaged ({error}); delete {path.parent.parent}"
            ) from error
        self.found += 1
        return result


def forget(folder: Path) -> None:
    """Remove what earlier runs into `folder` left unfinished."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"": type(value).__name__} | {key: _encode(own) for key, own in vars(value).items()}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and "" in value:
        fields = {key: _decode(own) for key, own in value.items() if key}
        return getattr(curvature, value[""])(**fields)
    return value
