"""Read checkpoints, and say clearly why one cannot be read.

A checkpoint is what `torch.save` wrote: a bare state dict, or a dict that holds one under "model",
"state_dict" or "model_state_dict", and perhaps the optimizer's state under "optimizer" or
"optimizer_state_dict". It is read with weights_only=True: it holds numbers, and can never name code to run.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command import InputError
from problems import kind
from torch import Tensor, nn

MODEL_KEYS = ("model", "state_dict", "model_state_dict")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's numbers: the state of the model, and of the optimizer if it was saved."""

    path: Path
    state: dict[str, Any]
    optimizer: Mapping[str, Any] | None

    def load_into(self, model: nn.Module) -> list[str]:
        """Copy the state into `model` and return notes for the user; wrapper prefixes are stripped.

        Raises:
            InputError: if names or shapes differ from the model's; the first few are listed.
        """
        expected = model.state_dict()
        state, notes = self.state, []
        if state.keys() != expected.keys():
            state = {_bare(key): value for key, value in state.items()}
            if state.keys() != self.state.keys():
                notes.append(f'{self.path}: stripped the prefixes of DDP ("module.") or compile ("_orig_mod.")')
        differences = _differences(state, expected)
        if differences:
            raise InputError(
                f"{self.path} is of another architecture than build_model() gives: {'; '.join(differences)}; "
                "make build_model() match, or name the problem file this checkpoint was trained with"
            )
        model.load_state_dict(state)
        return notes


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`, read on the CPU with weights_only=True.

    Raises:
        InputError: if it is missing, damaged, holds objects, or no state dict can be found in it.
    """
    content = _read(path)
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds a {kind(content)}; expected a state dict, or a dict with one under "
            f"{_or(MODEL_KEYS)}; "
            'save {"model": model.state_dict()}'
        )
    nested = [content[key] for key in MODEL_KEYS if isinstance(content.get(key), Mapping)]
    state = dict(nested[0] if nested else content)
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f"{path} holds no state dict; expected one, or a dict with one under {_or(MODEL_KEYS)}, "
            f"got the keys {_few([str(key) for key in content])}"
        )
    optimizers = [content[key] for key in OPTIMIZER_KEYS if isinstance(content.get(key), Mapping)]
    return Checkpoint(path, state, optimizers[0] if nested and optimizers else None)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"no checkpoint file at {path}; expected a file that torch.save wrote")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail anywhere: KeyError, IndexError, RuntimeError, EOFError, ...
        text = str(error).lower()
        if isinstance(error, pickle.UnpicklingError) and (
            "unsupported global" in text or "unsupported class" in text
        ):
            raise InputError(
                f"{path} holds a pickled object, which could run code when read; expected tensors in plain "
                'containers: save {"model": model.state_dict()}, not the model itself'
            ) from error
        raise InputError(_damaged(path)) from error


def _damaged(path: Path) -> str:
    return (
        f"expected a file that torch.save wrote, but {path} ({path.stat().st_size} bytes) is truncated, "
        "corrupt or of another format; copy or save it again"
    )


def _differences(state: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shaped = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if isinstance(value, Tensor) and isinstance(state.get(key), Tensor) and state[key].shape != value.shape
    ]
    other = [
        f"{key} is a {kind(state[key])}"
        for key, value in expected.items()
        if isinstance(value, Tensor) and not isinstance(state.get(key, value), Tensor)
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped), ("no tensor", other))
    return [f"{len(keys)} {what} ({_few(keys)})" for what, keys in found if keys]


def _bare(key: str) -> str:
    key = key.replace("_orig_mod.", "")
    return key.removeprefix("module.")


def _few(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f", ... {len(names) - shown} more" if len(names) > shown else "")


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(f'"{name}"' for name in names)
