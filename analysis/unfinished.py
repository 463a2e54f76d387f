"""Keep what a long run has measured, so that a killed one goes on where it was.

Each result is written to DIR/unfinished/COMMAND-KEY/VARIANT-NAME.pt as soon as it is known, whole or not at all.
KEY is a digest of everything the result depends on, see `identity`. The same command, run again, reads what it
finds there; every estimate is seeded, so the outcome is that of one uninterrupted run. A run that ends well removes
what its command left there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from checkpoints import Checkpoint
from command import InputError, replacing
from problems import Problem
from spectrum_files import versions
from torch import nn
from tqdm import tqdm

from gradcond import curvature

FOLDER = "unfinished"
INTERRUPTED = "interrupted; the same command goes on from here"
Result = TypeVar("Result")


class Unfinished:
    """The results of one checkpoint, on disk.

    Args:
        folder: where the run writes to.
        command: whose results they are.
        *parts: bytes, or what JSON can hold, that the results depend on.
    """

    def __init__(self, folder: Path, command: str, *parts: Any) -> None:
        digest = hashlib.sha256()
        for part in parts:
            own = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
            digest.update(hashlib.sha256(own).digest())
        self.key = digest.hexdigest()
        self.folder = folder / FOLDER / f"{command}-{self.key[:16]}"
        self.found = 0  # results read, not measured

    def __call__(self, variant: str, name: str, measure: Callable[[], Result]) -> Result:
        """Return the result of this variant and name: the one on disk, or that of `measure`, which is then kept.

        Raises:
            InputError: if the file on disk cannot be read.
        """
        path = self._path(variant, name)
        if not path.exists():
            result = measure()
            with replacing(path) as file:
                torch.save(_encode(result), file)
            return result
        try:
            result = _decode(torch.load(path, weights_only=True))
        except Exception as error:
            raise InputError(f"{path} of an earlier run is damaged ({error}); delete it") from error
        self.found += 1
        return result

    def has(self, variant: str, name: str) -> bool:
        """Is this result on disk?"""
        return self._path(variant, name).exists()

    def _path(self, variant: str, name: str) -> Path:
        return self.folder / f"{variant}-{name}.pt"

    def tell(self, path: Path) -> None:
        """Print how many results of the checkpoint at `path` were found, if any."""
        if self.found:
            tqdm.write(f"{path}: {self.found} results are of the run that was interrupted")


def identity(
    problem: Problem, checkpoint: Checkpoint, model: nn.Module, loss: float, args: argparse.Namespace
) -> list[Any]:
    """Return what the results of a checkpoint depend on.

    These are the options, the contents of both files, the versions, and of what else the problem file reads or
    imports, what shows: the parameters and the loss on the data.
    """
    options = {key: value for key, value in vars(args).items() if key not in ("checkpoints", "problem", "out")}
    parameters = [[name, list(p.shape), p.requires_grad] for name, p in model.named_parameters()]
    files = [problem.path.read_bytes(), checkpoint.path.read_bytes()]
    return [options, *files, versions(), parameters, loss.hex()]


def forget(folder: Path, command: str) -> None:
    """Remove what earlier runs of `command` into `folder` left unfinished."""
    for own in (folder / FOLDER).glob(f"{command}-*"):
        shutil.rmtree(own, ignore_errors=True)
    with contextlib.suppress(OSError):  # none was left, or another command's are
        (folder / FOLDER).rmdir()


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"": type(value).__name__} | {key: _encode(own) for key, own in vars(value).items()}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and "" in value:
        fields = {key: _decode(own) for key, own in value.items() if key}
        return getattr(curvature, value[""])(**fields)
    return value
