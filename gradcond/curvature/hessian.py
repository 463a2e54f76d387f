"""Hessian and generalized Gauss-Newton of a model's loss on a whole data set, known by their products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.curvature.losses import Mean
from gradcond.curvature.operators import ASYMMETRY, Operator, generator_from, working_dtype
from gradcond.curvature.passes import batches, forward, left_as_found, map_tensors, unwrap

Term = Callable[[Any, Callable[[Any], Tensor]], Tensor]  # (output, loss of an output) -> what to add up


class _LossOperator(Operator):
    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Iterable[Any],
        *,
        weight_fn: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.loss_fn, self.weight_fn = unwrap(model), loss_fn, weight_fn
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("expected a model with trainable parameters, but none requires grad")
        self.data: Iterable[Any] = list(data) if isinstance(data, Iterator) else data
        if isinstance(data, Sized) and len(data) == 0:
            raise ValueError("expected at least one batch, got an empty data set")
        dtype = self.parameters[0].dtype
        for p in self.parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        if dtype not in ASYMMETRY:
            raise ValueError(f"expected real floating-point parameters, got {dtype}")
        super().__init__(sum(p.numel() for p in self.parameters), dtype, self.parameters[0].device)
        self._noise: float | None = None
        self._seed = 0

    def loss(self) -> Tensor:
        """The loss on all batches concatenated, a scalar."""
        return self._mean(lambda output, loss: loss(output).detach())

    def gradient(self) -> Tensor:
        """Its gradient (n,), in the working dtype."""
        return self._mean(lambda output, loss: self._flat(_grad([loss(output)], self.parameters)))

    def check_deterministic(self) -> float:
        """The relative difference of two products of the same vector, under different random states.

        Costs two products, once per operator; eigsh, spectral_density, condition_number, trace and diagonal
        call it before they start.

        Raises:
            ValueError: the products differ by more than rounding explains.
        """
        if self._noise is None:
            v = torch.randn(self.shape[0], generator=generator_from(0), dtype=torch.float64)
            v = v.to(self.device, working_dtype(self.dtype))
            first = self @ v
            self._seed = 1
            try:
                second = self @ v
            finally:
                self._seed = 0
            noise = float((first - second).norm() / first.norm().clamp_min(torch.finfo(v.dtype).tiny))
            if noise > ASYMMETRY[self.dtype]:
                raise ValueError(
                    f"two products of the same vector differ by {noise:.1e} of their size; {self._culprit()}"
                )
            self._noise = noise
        return self._noise

    def _culprit(self) -> str:
        training = [(name, type(m).__name__) for name, m in self.model.named_modules() if m.training]
        random = [name for name, kind in training if "Dropout" in kind]
        norms = [name for name, kind in training if "Norm" in kind]
        if random:
            return f"dropout is active in {random[0]!r}: call model.eval() first"
        if norms:
            return f"{norms[0]!r} normalizes by batches that change: do not shuffle, or call model.eval()"
        return "something random remains: augmentation, a sampler, or functional dropout"

    def _columns(self, V: Tensor) -> Tensor:
        return self._mean(lambda output, loss: self._term(output, loss, V))

    def _term(self, output: Any, loss: Callable[[Any], Tensor], V: Tensor) -> Tensor:
        raise NotImplementedError

    def _mean(self, term: Term) -> Tensor:
        """The term summed over the batches and divided by the weight of all."""
        mean, total = Mean(self.loss_fn, self.weight_fn), torch.zeros((), device=self.device)
        with left_as_found(self.model, self.data, self._seed):
            for batch in batches(self.data, self.device):
                weight = self.weight_fn(batch) if self.weight_fn else None
                if weight is None or float(weight) != 0:
                    loss = functools.partial(mean.numerator, batch=batch, weight=weight)
                    total = total + term(forward(self.model, batch[0]), loss)
        return total / mean.divisor()

    def _split(self, v: Tensor) -> list[Tensor]:
        parts = v.split([p.numel() for p in self.parameters])
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        dtype = working_dtype(self.dtype)
        return torch.cat([part.detach().reshape(-1).to(self.device, dtype) for part in parts])


class Hessian(_LossOperator):
    """The Hessian of a model's loss on all batches concatenated, known by its products.

        H v = d/dtheta <d loss/dtheta, v>,   loss = loss_fn(model(all inputs), all targets)

    Symmetric; over the parameters that require grad, flattened in the order of ``model.parameters()``;
    unused parameters are zero rows, tied ones appear once. The modules stay in the mode they are in, and
    nothing is left changed: parameters, buffers, ``.grad``, flags, random states. Products are double
    backward passes (attention by its math kernel); the k columns of ``H @ V`` share one forward and one
    backward pass per batch. A half-precision model takes float32 vectors too.

    The losses of torch (modules and functions, also through functools.partial) are weighted exactly:
    reduction, ``ignore_index``, class weights, label smoothing. Any other loss_fn is taken as a mean over
    equal batches; for uneven ones let it return ``(numerator, denominator)`` or pass weight_fn.

    Args:
        model: any module; torch.compile and data-parallel wrappers are unwrapped.
        loss_fn: ``loss_fn(output, target)``, a scalar or a pair (numerator, denominator).
        data: iterable of batches (input, target), gone through once per product. A one-shot iterator is
            read into a list. A mapping as input is passed as keyword arguments.
        weight_fn: ``weight_fn(batch)``, the weight of a batch's loss in the mean.

    Raises:
        ValueError: no trainable parameter or no batch; in products also a loss that is not scalar or not
            finite, batches of unknown weight, a vector of wrong shape or dtype.

    References:
        B. A. Pearlmutter, Fast exact multiplication by the Hessian, 1994.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> H = Hessian(model, nn.MSELoss(), [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))])
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
    """

    def _term(self, output: Any, loss: Callable[[Any], Tensor], V: Tensor) -> Tensor:
        gradient = _grad([loss(output)], self.parameters, create_graph=True)
        return self._second(gradient, self.parameters, V)

    def _second(self, gradient: Sequence[Tensor], parameters: Sequence[Tensor], V: Tensor) -> Tensor:
        curved = [i for i, g in enumerate(gradient) if g.requires_grad]
        if not curved:
            return torch.zeros_like(V)
        columns = []
        for v in V.unbind(1):
            parts = self._split(v)
            product = _grad([gradient[i] for i in curved], parameters, [parts[i] for i in curved])
            columns.append(self._flat(product))
        return torch.stack(columns, 1)


class GGN(_LossOperator):
    """The generalized Gauss-Newton matrix J^T (d^2 loss / d output^2) J on all batches concatenated.

    Symmetric, and positive semi-definite when the loss is convex in the output; equal to the Hessian where
    the model is linear in its parameters, and to the Fisher information for cross-entropy and squared
    error. J v comes from two backward passes (J^T u is linear in u). Everything else, the arguments
    included, is as in :class:`Hessian`.

    References:
        N. N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002.
        J. Townsend, A new trick for calculating Jacobian vector products, 2017.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> G = GGN(model, nn.MSELoss(), [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))])
        >>> G.to_dense()
        tensor([[1., 0.],
                [0., 4.]])
    """

    def _term(self, output: Any, loss: Callable[[Any], Tensor], V: Tensor) -> Tensor:
        # cut the graph at the outputs: the loss above, the model below
        tops: list[Tensor] = []
        leaves: list[Tensor] = []

        def cut(z: Tensor) -> Tensor:
            if not z.requires_grad:
                return z
            tops.append(z)
            leaves.append(z.detach().requires_grad_())
            return leaves[-1]

        slopes = _grad([loss(map_tensors(output, cut))], leaves, create_graph=True)
        curved = [i for i, s in enumerate(slopes) if s.requires_grad]
        if not curved:
            return torch.zeros_like(V)
        dummies = [torch.zeros_like(z, requires_grad=True) for z in tops]
        pulled = _grad(tops, self.parameters, dummies, create_graph=True)
        linear = [i for i, g in enumerate(pulled) if g.requires_grad]
        columns = []
        for v in V.unbind(1):
            parts = self._split(v)
            pushed = _grad([pulled[i] for i in linear], dummies, [parts[i] for i in linear])
            bent = _grad([slopes[i] for i in curved], leaves, [pushed[i] for i in curved])
            columns.append(self._flat(_grad(tops, self.parameters, bent)))
        return torch.stack(columns, 1)


def _grad(
    ys: Sequence[Tensor], xs: Sequence[Tensor], vs: Sequence[Tensor] | None = None, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Vector-Jacobian product, zeros where x does not enter y; the graph of y is kept."""
    if not any(y.requires_grad for y in ys):
        raise ValueError("expected a loss that depends on the trainable parameters; is it detached?")
    return torch.autograd.grad(ys, xs, vs, retain_graph=True, create_graph=create_graph, materialize_grads=True)
