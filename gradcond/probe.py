"""Which layers feed batch normalization: there P of a layer without a bias needs no centering."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradcond.capture import InputCapture
from gradcond.hooks import Hook, drop_inert

__all__ = ["BatchNormProbe"]


class BatchNormProbe(Hook):
    """Finds the layers whose output goes straight into batch normalization by batch statistics."""

    def __init__(self, captures: Iterable[InputCapture], model: nn.Module) -> None:
        self.captures = list(captures)
        self.handles: list[RemovableHandle] = []
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and self.captures:
                drop_inert(module)
                self.handles.append(module.register_forward_hook(self, with_kwargs=True))
        for capture in self.captures:
            capture.probed = bool(self.handles)

    def leave(self, names: Container[str]) -> None:
        """Asks no more of these layers; of none, once all are known."""
        for capture in self.captures:
            capture.probed = capture.probed and capture.layer.name not in names
        self.captures = [capture for capture in self.captures if capture.probed]
        if not self.captures:
            self.remove()

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Marks the layer whose last output is this module's input."""
        if torch.compiler.is_compiling() or not (module.training or module.running_mean is None):
            return
        x = args[0] if args else kwargs["input"]
        for capture in self.captures:
            output_ref, version = capture.last_output
            last = output_ref()
            # an in-place activation in between moves the version; with more axes, channels are not the units
            if last is not None and last is x and last._version == version and x.dim() == 2 + capture.layer.taps:
                capture.feeds_batch_norm = True

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for capture in self.captures:
            capture.probed = False
