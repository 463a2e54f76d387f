"""Hessian and generalized Gauss-Newton of a model's loss on a whole data set, known by their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.loss_operator import LossOperator, grad
from gradcond.curvature.passes import map_tensors


class Hessian(LossOperator):
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
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> H = Hessian(model, torch.nn.MSELoss(), data)
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
    """

    def _term(self, output: Any, loss: Callable[[Any], Tensor], V: Tensor) -> Tensor:
        gradient = grad([loss(output)], self.parameters, create_graph=True)
        curved = [i for i, g in enumerate(gradient) if g.requires_grad]
        if not curved:
            return torch.zeros_like(V)
        columns = []
        for v in V.unbind(1):
            parts = self._split(v)
            product = grad([gradient[i] for i in curved], self.parameters, [parts[i] for i in curved])
            columns.append(self._flat(product))
        return torch.stack(columns, 1)


class GGN(LossOperator):
    """The generalized Gauss-Newton matrix J^T (d^2 loss / d output^2) J on all batches concatenated.

    Symmetric, and positive semi-definite when the loss is convex in the output; equal to the Hessian where
    the model is linear in its parameters, and to the Fisher information for cross-entropy and squared
    error. J v comes from two backward passes (J^T u is linear in u). Everything else, the arguments
    included, is as in :class:`Hessian`.

    References:
        N. N. Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002.
        J. Townsend, A new trick for calculating Jacobian vector products, 2017.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> G = GGN(model, torch.nn.MSELoss(), data)
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

        slopes = grad([loss(map_tensors(output, cut))], leaves, create_graph=True)
        curved = [i for i, s in enumerate(slopes) if s.requires_grad]
        if not curved:
            return torch.zeros_like(V)
        dummies = [torch.zeros_like(z, requires_grad=True) for z in tops]
        pulled = grad(tops, self.parameters, dummies, create_graph=True)
        linear = [i for i, g in enumerate(pulled) if g.requires_grad]
        columns = []
        for v in V.unbind(1):
            parts = self._split(v)
            pushed = grad([pulled[i] for i in linear], dummies, [parts[i] for i in linear])
            bent = grad([slopes[i] for i in curved], leaves, [pushed[i] for i in curved])
            columns.append(self._flat(grad(tops, self.parameters, bent)))
        return torch.stack(columns, 1)
