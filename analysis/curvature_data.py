"""Real data for the spectra of large networks, one batch at a time, and the memory they take."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from command import InputError, read_npz
from torch import Tensor


class Images:
    """Batches of CIFAR images, made floating-point one at a time."""

    def __init__(self, path: Path, samples: int, batch: int) -> None:
        x, y = (array[:samples] for array in read_npz(path, ("x_train", "y_train")))
        if x.shape[1:] != (32, 32, 3):
            raise InputError(f"--images: expected images of 32 x 32 x 3, got {x.shape} in {path}")
        self.x, self.y, self.batch = torch.from_numpy(x), torch.from_numpy(y).flatten().long(), batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.x.split(self.batch), self.y.split(self.batch), strict=True):
            yield (x.permute(0, 3, 1, 2).float() / 255 - 0.47) / 0.25, y

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch)


class Text:
    """Batches of byte sequences, and the bytes after them."""

    def __init__(self, paths: Sequence[Path], samples: int, batch: int, tokens: int = 256) -> None:
        text = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in paths)), dtype=torch.uint8)
        rows = min(samples, (len(text) - 1) // tokens)
        if rows == 0:
            raise InputError(f"--text: expected at least {tokens + 1} bytes, got {len(text)}")
        self.x, self.y = (text[i : i + rows * tokens].view(rows, tokens) for i in (0, 1))
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.x.split(self.batch), self.y.split(self.batch), strict=True):
            yield x.long(), y.long().flatten()

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch)


def highest_resident() -> int:
    """The most bytes this process has held since `reset_resident`, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def reset_resident() -> None:
    """Start over from what is held now, what has been freed given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def rise(action: Callable[[], Any]) -> tuple[Any, int]:
    """What an action returns, and how far the resident size rose in it."""
    reset_resident()
    before = highest_resident()
    result = action()
    return result, highest_resident() - before
