"""The graph that is kept between products with a single batch, and what using it again has to put back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.curvature.objective import Mean, Share, divisor
from gradcond.curvature.passes import Draws, calls_python, left_as_found, without_hooks
from gradcond.curvature.products import Product
from gradcond.curvature.snapshot import Snapshot


@dataclass
class Kept:
    """A product with its graph, and all that it depends on."""

    snapshot: Snapshot
    product: Product
    share: Share | None
    parameters: Sequence[Tensor]
    draws: bool = True  # until a product has shown that it draws no random number
    quiet: bool = False  # and that it runs no Python code, which might look at a switch

    @functools.cached_property
    def divisor(self) -> Any:
        """What the product is divided by where this batch is all."""
        assert self.share is not None
        return divisor(*Mean(self.share).sums)

    def again(
        self, multiply: Callable[[], None], model: nn.Module, data: Any, seed: int, whole: bool | None
    ) -> None:
        """Multiply in the surroundings that it needs, and put them back.

        Args:
            multiply: uses the product.
            model: that the graph is of.
            data: its batch, in a list.
            seed: of what is drawn on the way.
            whole: whether it is the whole product with one vector, False for one vector and a block, which needs
                no more than a part of the graph; None where there are several, for which the model may be run.
        """
        if whole is not None and self.quiet:
            with torch.inference_mode(False), without_hooks((), self.parameters):
                return multiply()
        with left_as_found(model, self.parameters, data, seed, whole is None or self.draws):
            if not (whole and self.draws):
                return multiply()
            before, calls = Draws(), calls_python(multiply)
            self.draws = not before.unmoved()
            # a device runs backward passes in threads of its own, whose calls are not seen
            self.quiet = not (self.draws or calls) and all(p.device.type == "cpu" for p in self.parameters)
