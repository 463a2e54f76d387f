"""Read problem files: the model, the data and the loss that a checkpoint belongs to.

A problem file is plain Python, named by the user, with `build_model()` -> torch.nn.Module, `load_data()` ->
iterable of (input, target) batches, and `loss_fn(output, target)` -> scalar. It can import siblings. For a
loss of unknown weighting on uneven batches it may define `weight_fn(batch)`: see gradcond.curvature.Hessian.
Where loss_fn is a gradcond.curvature.ModelLoss, batches are of any form.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from command import InputError
from torch import Tensor, nn

from gradcond.curvature import ModelLoss

PROBLEM_NAMES = ("build_model", "load_data", "loss_fn")


@dataclass(frozen=True)
class Problem:
    """What a problem file defines; its folder is importable while its functions run."""

    path: Path
    module: ModuleType

    @property
    def loss_fn(self) -> Callable[[Any, Any], Any]:
        """The loss of (output, target)."""
        return self.module.loss_fn

    @property
    def weight_fn(self) -> Callable[[Any], Any] | None:
        """The weight of a batch in the mean of the loss, if the file defines it."""
        return getattr(self.module, "weight_fn", None)

    def build_model(self, *, seed: int = 0) -> nn.Module:
        """Return a fresh model, drawn from `seed`; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]), _importing_beside(self.path):
            torch.manual_seed(seed)
            model = _call(self.path, "build_model", self.module.build_model)
        if not isinstance(model, nn.Module):
            raise InputError(
                f"{self.path}: build_model() must return a torch.nn.Module, got {type(model).__name__}"
            )
        return model

    def load_data(self, *, seed: int = 0) -> list[Any]:
        """Return all batches, read once so that every product sees the same ones.

        They are (input, target), or of any form for a ModelLoss. A loader that shuffles or augments draws from
        `seed`; the global generator is left as it was.
        """
        with torch.random.fork_rng(devices=[]), _importing_beside(self.path):
            torch.manual_seed(seed)
            batches = _call(self.path, "load_data", lambda: list(self.module.load_data()))
        if not batches:
            raise InputError(
                f"{self.path}: load_data() must give at least one (input, target) batch, got none; "
                "check the path and the split it reads"
            )
        if isinstance(self.loss_fn, ModelLoss):
            return batches
        for batch in batches:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise InputError(
                    f"{self.path}: load_data() must give (input, target) batches, got a {kind(batch)}; "
                    "for a single batch return [(inputs, targets)]"
                )
            if any(isinstance(part, Tensor) and part.ndim and not len(part) for part in batch):
                raise InputError(f"{self.path}: load_data() gave a batch without samples; leave out empty batches")
        return [(batch[0], batch[1]) for batch in batches]


def load_problem(path: Path) -> Problem:
    """Run the problem file at `path` and return what it defines.

    Raises:
        InputError: if it is missing, does not run, or lacks one of the three names.
    """
    if not path.is_file():
        raise InputError(f"no problem file at {path}; expected a Python file that defines {_names()}")
    spec = importlib.util.spec_from_file_location(f"_gradcond_problem_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise InputError(f"a problem file is Python and ends in .py, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up here
    with _importing_beside(path):
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            raise InputError(
                f"{error.filename}, line {error.lineno}, is not Python: {error.msg}; mend the problem file"
            ) from error
        except (Exception, SystemExit) as error:
            raise InputError(
                f"{path} did not run: {_told(path, error)}; it must define {_names()} and leave work to them"
            ) from error
    missing = [name for name in PROBLEM_NAMES if not hasattr(module, name)]
    if missing:
        raise InputError(f"{path} must define {_names()}; it lacks {', '.join(missing)}")
    for name in PROBLEM_NAMES:
        if not callable(getattr(module, name)):
            raise InputError(
                f"{path}: {name} must be a function, got a {kind(getattr(module, name))}; write def {name}(...)"
            )
    return Problem(path, module)


def to(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return `batch` on `device`, its floating-point tensors as `dtype` (None: as is), at any nesting."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None)
    if isinstance(batch, Mapping):
        return {key: to(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [to(value, device, dtype) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


@contextmanager
def _importing_beside(path: Path) -> Iterator[None]:
    """Make the folder of `path` importable; forget its modules after, so the next problem finds its own."""
    folder, before = str(path.resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and str(Path(file).parent) == folder:
                del sys.modules[name]


def _call(path: Path, name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise InputError(f"{path}: {name}() failed: {_told(path, error)}") from error


def _told(path: Path, error: BaseException) -> str:
    # the innermost line of the user's own code says where
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [f" ({file.name}, line {line})" for file, line in places if file.parent == path.resolve().parent]
    return f"{type(error).__name__}: {error}{own[-1] if own else ''}"


def kind(value: Any) -> str:
    """Name the type of `value`, with the shape if it is a tensor."""
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"{type(value).__name__}{shape}"


def _names() -> str:
    return "build_model(), load_data() and loss_fn"
