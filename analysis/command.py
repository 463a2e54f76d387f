"""What the commands share: errors a user can mend, files that appear whole or not at all, labels."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


class InputError(ValueError):
    """Something the user handed in cannot be used; the text says what was expected, what came, what to do."""


def ending(interrupted: str = "interrupted") -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Have a command's main(argv) tell what the user can mend in one line, and end with status 2.

    Args:
        interrupted: the line of a run that was stopped, which ends with status 130.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def ended(argv: Sequence[str] | None = None) -> int:
            try:
                return main(argv)
            except (InputError, MemoryError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return 130

        return ended

    return decorate


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and the defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a command's parser; its --help says what the command's docstring does, and every default."""
    return argparse.ArgumentParser(description=description, formatter_class=_Formatter)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Gather what `path` shall hold; it is written when the block ends well, and takes that name when it is whole.

    A reader therefore sees the old file or the new one, never half of one. Missing folders are created.

    Raises:
        InputError: if it cannot be written, as where the disk is full.
    """
    gathered = io.BytesIO()
    yield gathered
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(gathered.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; mend that and give the command again") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def require_folder(path: Path) -> None:
    """Refuse a folder that could not be written to, before anything long is computed; creates nothing.

    Raises:
        InputError: if `path`, or the nearest parent that exists, is a file or not writable.
    """
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"expected a folder to write to, but {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"expected a folder to write to, but {existing} is read-only; name another folder")


def to_json(value: Any) -> Any:
    """Return `value` as strict JSON can hold it: tensors and arrays as lists, NaN and infinities as null.

    >>> to_json({"kappa": float("inf"), "pair": (1, 2.5)})
    {'kappa': None, 'pair': [1, 2.5]}
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float) or value is None:
        return value
    return str(value)


def write_json(path: Path, version: int, report: Mapping[str, Any]) -> None:
    """Write a report as strict, indented JSON, which begins with "format": `version`."""
    text = json.dumps(to_json({"format": version, **report}), indent=2, allow_nan=False)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


def read_json(path: Path, version: int) -> dict[str, Any]:
    """Return the report that an earlier run wrote as "format": `version`.

    Raises:
        InputError: if the file is missing, damaged or of another format.
    """
    if not path.is_file():
        raise InputError(f"no {path}; --redraw needs that of an earlier run")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); measure again") from error
    if not isinstance(report, dict) or report.get("format") != version:
        raise InputError(f'{path} must have "format": {version}; measure again with this version')
    return report


def read_npz(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Return the arrays of these names from an .npz file.

    Raises:
        InputError: if it cannot be read, or lacks one of them.
    """
    try:
        with np.load(path) as file:
            return [file[name] for name in names]
    except Exception as error:  # other bytes fail anywhere: ValueError, EOFError, BadZipFile, ...
        raise InputError(f"expected an .npz file with {', '.join(names)} at {path}: {error}") from error


def device(text: str) -> torch.device:
    """Read a device that is here from a command line."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"expected a device that is here, got {text!r}: {reason}") from error


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays, as numpy.savez does."""
    with replacing(path) as file:
        np.savez(file, **dict[str, Any](arrays))


def labels(paths: Sequence[Path], *, suffix: bool = False) -> list[str]:
    """Return the shortest names that tell `paths` apart: the last part, or as many parents as it takes.

    The suffix is kept when asked for, when it holds digits, or when two names would be the same without it.

    >>> labels([Path("/a/sgd/last.pt"), Path("/a/bnp/last.pt")])
    ['sgd/last', 'bnp/last']
    """
    whole = [path.resolve() for path in paths]
    depth = max(len(path.parts) for path in whole)
    for keep_suffix in (suffix, True):
        # "lr0.5" has none that could go
        parts = [p.parts if keep_suffix or not p.suffix[1:].isalpha() else p.with_suffix("").parts for p in whole]
        for length in range(1, depth + 1):
            names = ["/".join(part[-length:]) for part in parts]
            if len(set(names)) == len(set(whole)):
                return names
    return [str(path) for path in paths]
