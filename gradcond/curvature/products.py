"""Products of a batch's matrix with vectors by two methods, and the timed probe that chooses between them."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradcond.curvature.sketch import relative_difference, sketch

Parts = Sequence[Tensor]  # one tensor a parameter
# a product of one vector, or of several stacked in front of each part (batched=True); by double backward also with
# the diagonal block of some of the parameters, when their places are given as a third argument
Product = Callable[..., Parts]
# seconds: beside longer products, what the first one costs more is little; forward mode loads a third of a second's
# worth of decompositions in it, a device its kernels
SHORT, SHORT_ON_DEVICE = 0.5, 1.0
# near a tie the choice, and with it the rounding, should not depend on the load of the machine
FASTER = 0.75
METHODS = ("auto", "double_backward", "forward_over_reverse")


def roots(tensors: Parts) -> list[GradientEdge]:
    """Where tensors hang in the graph: enough to differentiate them, and their values can be freed."""
    return [get_gradient_edge(t) for t in tensors]


def grad(
    ys: Sequence[Tensor | GradientEdge],
    xs: Parts,
    vs: Parts | None = None,
    create_graph: bool = False,
    batched: bool = False,
    free: bool = False,
) -> tuple[Tensor, ...]:
    """Vector-Jacobian product, zeros where x does not enter y; the graph of y is kept unless freed."""
    if not any(isinstance(y, GradientEdge) or y.requires_grad for y in ys):
        raise ValueError("expected a loss that depends on the trainable parameters; is it detached?")
    options: dict[str, Any] = {"create_graph": create_graph, "is_grads_batched": batched}
    slopes = torch.autograd.grad(cast(Parts, ys), xs, vs, retain_graph=not free, allow_unused=True, **options)
    lead = vs[0].shape[:1] if batched and vs else ()
    return tuple(x.new_zeros((*lead, *x.shape)) if g is None else g for g, x in zip(slopes, xs, strict=True))


def require_derivatives(gradients: Sequence[Tensor]) -> None:
    """Raise ValueError where an operation's derivative has none: torch takes it for zero without a word."""
    left = [g.grad_fn for g in gradients if g.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        if node.name() == "torch::autograd::Error":
            raise ValueError(
                "expected operations that can be differentiated twice, but one of the model's or the loss's has no "
                "second derivative (a torch.autograd.Function whose backward is marked @once_differentiable?); "
                "write its backward by differentiable operations"
            )
        below = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= below
        left += below


@functools.cache
def warm_forward_mode() -> None:
    """The first dual number makes torch load its decompositions, by a function that it deprecates itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(*torch.zeros(2, 1, device="cpu"))


@contextmanager
def duals(parameters: Mapping[str, Tensor], tangents: Parts) -> Iterator[dict[str, Tensor]]:
    """The parameters with tangents: whatever is computed from them inside carries its directional derivative."""
    warm_forward_mode()
    with forward_ad.dual_level():
        yield {name: forward_ad.make_dual(p, v) for (name, p), v in zip(parameters.items(), tangents, strict=True)}


def primal_and_tangent(z: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of a dual number; zero is the tangent of any other."""
    primal, tangent = forward_ad.unpack_dual(z)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


@dataclass(frozen=True)
class Probe:
    """Which product method was taken, and why."""

    method: str  # "double_backward" or "forward_over_reverse"
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)  # per product with the first batch, by method


@dataclass
class Trial:
    """A product with one vector by both methods, each timed; at most one graph at a time."""

    build: Callable[[], Product]  # the graph of double backward, and the product with it
    forward: Product
    parts: Parts
    keeps: bool  # whether that graph is kept from product to product: building it does not count
    costs: float  # least time of a product by forward mode, in times of building, as it computes all that, too
    seconds: dict[str, float] = field(default_factory=dict)
    building: float = math.inf  # the quickest so far, as all times: others may use the machine
    applying: float = math.inf
    product: Product | None = None  # by double backward, the last one built

    def by_double_backward(self) -> Parts:
        """The product, once its graph has been built."""
        self.product = None
        self.product, building = _timed(self.build, self.parts[0].device)
        self.building = min(building, self.building)
        return self._apply(self.product)

    def _apply(self, product: Product) -> Parts:
        result, applying = _timed(functools.partial(product, self.parts, False), self.parts[0].device)
        self.applying = min(applying, self.applying)
        self.seconds["double_backward"] = self.applying + (0 if self.keeps else self.building)
        return result

    def by_forward_mode(self) -> Parts:
        """The product."""
        self.product = None
        product = functools.partial(self.forward, self.parts, False)
        result, seconds = _timed(product, self.parts[0].device)
        self.seconds["forward_over_reverse"] = min(seconds, self.seconds.get("forward_over_reverse", math.inf))
        return result

    @property
    def is_short(self) -> bool:
        """Whether what a first run costs more is much beside it."""
        return min(self.seconds.values()) < _short(self.parts[0].device)

    def decided(self) -> bool:
        """Whether forward mode cannot win."""
        if not self.keeps and self.costs <= 1:
            return False
        self.by_double_backward()
        if self.is_short:
            if self.keeps and self.product is not None:
                self._apply(self.product)
            else:
                self.by_double_backward()
        return FASTER * self.seconds["double_backward"] <= self.costs * self.building


def probe(trial: Trial, method: str, dtype: torch.dtype) -> tuple[Probe, Product | None]:
    """Compares the methods on the first batch: the faster one where both agree; and what was built, if it is kept.

    Of two runs the quicker one counts, where the first is short. Double backward, which has kernels for most,
    is the one to agree with.
    """

    def taken(name: str, reason: str) -> tuple[Probe, Product | None]:
        return Probe(name, reason, trial.seconds), trial.product if trial.keeps else None

    if method == "auto" and trial.decided():
        return taken("double_backward", "forward mode takes longer than building its graph")
    try:
        result = sketch(trial.by_forward_mode())
    except (RuntimeError, NotImplementedError) as error:
        trial.by_double_backward()  # an error of the model itself comes first
        if method != "auto":
            raise
        return taken("double_backward", f"no forward mode: {str(error).splitlines()[0]}")
    difference = relative_difference([result], [sketch(trial.by_double_backward())])
    if not difference <= _agreement(dtype):
        if method != "auto":
            raise ValueError(
                f"forward over reverse differs from double backward by {difference:.1e} of the product: an "
                'operation of the model has no or a wrong forward derivative; use method="double_backward"'
            )
        return taken("double_backward", f"forward over reverse differs by {difference:.1e}")
    if method != "auto":
        return Probe(method, "asked for, and agrees with double backward"), None
    if trial.is_short:
        trial.by_forward_mode()
        trial.by_double_backward()
    faster = trial.seconds["forward_over_reverse"] < FASTER * trial.seconds["double_backward"]
    return taken("forward_over_reverse" if faster else "double_backward", "the faster one")


def fastest_together(product: Product, ways: Sequence[Product], stacked: Parts, dtype: torch.dtype) -> int | None:
    """Which way takes several vectors in one vectorized pass; None where one after the other is about as fast.

    What the product makes of each is what the ways have to agree with.
    """
    columns, one_by_one, fastest = [], 0.0, None
    for i in range(len(stacked[0])):
        column, seconds = _timed(functools.partial(product, [p[i] for p in stacked], False), stacked[0].device)
        columns.append(sketch(column))
        one_by_one += seconds
        del column
    least = FASTER * one_by_one
    for place, way in enumerate(ways):
        seconds = _seconds_together(way, stacked, columns, dtype)
        if seconds < least:
            least, fastest = seconds, place
    return fastest


def _seconds_together(way: Product, stacked: Parts, columns: Parts, dtype: torch.dtype) -> float:
    """What one pass takes, infinity where there is none or its columns, as sketches, are others."""
    device = stacked[0].device
    try:
        together, seconds = _timed(lambda: way(stacked, True), device)
        if seconds < _short(device):
            del together
            together, again = _timed(lambda: way(stacked, True), device)
            seconds = min(seconds, again)
    except Exception:  # no batching rule, or whatever a model makes of tensors that are many at once
        return math.inf
    found = (sketch([part[i] for part in together]) for i in range(len(columns)))
    agree = (relative_difference([a], [b]) <= _agreement(dtype) for a, b in zip(found, columns, strict=True))
    return seconds if all(agree) else math.inf


def _short(device: torch.device) -> float:
    return SHORT if device.type == "cpu" else SHORT_ON_DEVICE


def _agreement(dtype: torch.dtype) -> float:
    """Half the digits: far above rounding, far below the percents of a wrong derivative."""
    return 2 * torch.finfo(dtype).eps ** 0.5


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result, and the seconds it took."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    start = time.perf_counter()
    result = function()
    wait(device)
    return result, time.perf_counter() - start
