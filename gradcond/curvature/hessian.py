"""Hessian and generalized Gauss-Newton of a model's loss on a whole data set, known by their products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.gauss_newton import Bend, GaussNewtonOperator
from gradcond.curvature.loss_operator import Evaluation, LossOperator
from gradcond.curvature.passes import map_tensors
from gradcond.curvature.products import Parts, Product, duals, grad, primal_and_tangent, roots

LIGHT = 5e-3  # seconds of a product that is too short to gain from forward mode


class Hessian(LossOperator):
    """The Hessian of a model's loss on all batches concatenated, known by its products.

        H v = d/dtheta <d loss/dtheta, v>,   loss = loss_fn(model(all inputs), all targets)

    Symmetric; over the parameters that require grad, flattened in the order of ``model.parameters()``;
    unused parameters are zero rows, tied ones appear once. The modules stay in the mode they are in, and
    nothing is left changed: parameters, buffers (those of a loss, too), batches, ``.grad``, flags, random states. A
    half-precision model takes float32 vectors too. ``names`` and ``slices`` say which entries are whose;
    ``block("fc*.weight")`` is the block of some of them.

    The losses of torch (modules and functions, also through functools.partial) are weighted exactly:
    reduction, ``ignore_index``, class weights, label smoothing. Any other loss_fn is taken as a mean over
    equal batches; for uneven ones let it return ``(numerator, denominator)`` or pass weight_fn.

    Products are double backward passes, or forward-mode derivatives of the gradient (attention by its math
    kernel; weight normalization, embedding bags and hard sigmoids step by step; sparse embeddings as dense ones).
    The first product times the first batch, and compares the two where forward mode might be faster; ``probe``
    says which it took, and why. Where there is one batch, the graph of double backward is kept from product to
    product until a parameter, a buffer, a mode, a setting or the batch changes; ``release()`` frees it. What a
    loss or a model reads from elsewhere than its arguments, closure and globals is not watched.

    Args:
        model: any module; torch.compile and data-parallel wrappers are unwrapped.
        loss_fn: ``loss_fn(output, target)``, a scalar or a pair (numerator, denominator); a loss that calls the
            model itself, ``loss_fn(model, batch)``, is wrapped in :class:`ModelLoss`.
        data: iterable of batches (input, target), of any form for a ModelLoss, gone through once per product. A
            one-shot iterator is read into a list. A mapping as input is passed as keyword arguments.
        weight_fn: ``weight_fn(batch)``, the weight of a batch's loss in the mean.
        method: "auto", "double_backward" or "forward_over_reverse". The choice of "auto" can differ from run to
            run, and with it the rounding; with a method asked for nothing is timed.
        chunk: most columns of ``H @ V`` that share the forward pass, None for all; less memory, more passes.
        process_group: processes whose batches together are the data, under torchrun, say: a group, None for the
            default group where torch.distributed has one, or False for this process alone. They may hold
            different numbers of batches. Every process must join each product, with the same vector.

    Raises:
        TypeError: a model that is no module, a loss that is no function.
        ValueError: no trainable parameter or no batch; in products also a loss that is not scalar or not
            finite, batches of unknown weight, a vector of wrong shape or dtype, an operation whose forward
            derivative is wrong (only where that method is asked for).

    References:
        B. A. Pearlmutter, Fast exact multiplication by the Hessian, 1994.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> H = Hessian(model, torch.nn.MSELoss(), data)
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
    """

    # tangents of the same forward and backward pass: three times the matrix products; measured 2.9 to 4.9
    _forward_costs = 2.5

    def _double_backward(self, evaluation: Evaluation) -> Product:
        parameters = evaluation.parameters
        gradient = grad([evaluation.loss()], parameters, create_graph=True)
        self._look_through(gradient)
        curved = [i for i, g in enumerate(gradient) if g.requires_grad]
        slopes = dict(zip(curved, roots([gradient[i] for i in curved]), strict=True))
        del gradient

        def product(parts: Parts, batched: bool, places: Sequence[int] | None = None) -> Parts:
            own = range(len(parameters)) if places is None else places
            moved = {i: part for i, part in zip(own, parts, strict=True) if i in slopes}
            if not moved:
                return [torch.zeros_like(part) for part in parts]
            above, below = [slopes[i] for i in moved], [parameters[i] for i in own]
            return grad(above, below, list(moved.values()), batched=batched, free=evaluation.frees)

        return product

    def _forward_over_reverse(self, evaluation: Evaluation) -> Product:
        of_name = dict(zip(self.names, evaluation.parameters, strict=True))

        def product(parts: Parts, batched: bool) -> Parts:
            with duals(of_name, parts) as moved:
                gradient = grad([evaluation.loss(moved)], list(moved.values()), free=True)
                return [primal_and_tangent(g)[1] for g in gradient]

        return product


class GGN(GaussNewtonOperator):
    """The generalized Gauss-Newton matrix J^T (d^2 loss / d output^2) J on all batches concatenated.

    Symmetric, and positive semi-definite when the loss is convex in the output; equal to the Hessian where
    the model is linear in its parameters, and to the Fisher information for cross-entropy and squared
    error. Zero where the loss is linear in the output, as NLLLoss is in log-probabilities: let the output be
    what log_softmax takes. A :class:`ModelLoss` must say what the output is. Everything else, the arguments
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

    _long = 0.2  # forward mode gains on longer ones, too

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective.require_output(type(self).__name__)

    def _tops(self, output: Any, batch: Any, evaluation: Evaluation) -> tuple[list[Tensor], Bend]:
        # cut the graph at the outputs: the loss above, the model below
        tops: list[Tensor] = []
        leaves: list[Tensor] = []
        evaluation.moving = []

        def cut(z: Tensor) -> Tensor:
            evaluation.moving.append(z.requires_grad)
            if not z.requires_grad:
                return z
            tops.append(z)
            leaves.append(primal_and_tangent(z)[0].detach().requires_grad_())
            return leaves[-1]

        value, evaluation.share = self.objective.of(map_tensors(output, cut), batch)
        if not leaves:
            raise ValueError(
                "expected an output of tensors that depend on the trainable parameters, or lists, tuples and dicts "
                f"of them, got {type(output).__name__}; say what to take of it: ModelLoss(loss_fn, output=...)"
            )
        slopes = grad([value], leaves, create_graph=True)
        curved = [i for i, s in enumerate(slopes) if s.requires_grad]

        def bend(parts: Parts, batched: bool) -> Parts:
            if not curved:
                return [torch.zeros_like(part) for part in parts]
            return grad([slopes[i] for i in curved], leaves, [parts[i] for i in curved], batched=batched)

        return tops, bend

    def _ways(self, product: Product) -> list[Product]:
        ways = super()._ways(product)
        return ways if self._seconds < LIGHT else [*ways, functools.partial(product, forward=True)]
