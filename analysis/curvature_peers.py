"""Hessian and GGN products of other libraries, each called as its own documentation says, on flat vectors.

What is missing is named, not guessed: `installed()` tells which of them can be imported. The versions that the
comparisons were written for are those of the extra `oracles`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batches = Sequence[tuple[Tensor, Tensor]]
Product = Callable[[Tensor], Tensor]  # (n,) -> (n,) or (n, k) -> (n, k)
MODULES = {
    "curvlinops": "curvlinops",
    "hessian-eigenthings": "hessian_eigenthings",
    "PyHessian": "pyhessian",
    "backpack": "backpack.hessianfree",
}


def load(module: str) -> Any:
    """The module; what it warns of while it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def installed() -> list[str]:
    """The libraries that can be imported here."""
    found = []
    for name, module in MODULES.items():
        try:
            load(module)
        except ImportError:
            continue
        found.append(name)
    return found


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters a product is over, in the order of the model's."""
    return [p for p in model.parameters() if p.requires_grad]


def split(v: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A flat vector as tensors of the parameters' shapes."""
    parts = v.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Tensors as one flat vector."""
    return torch.cat([part.reshape(-1) for part in parts])


def by_column(product: Product) -> Product:
    """A product with single vectors, for matrices too."""

    def columns(v: Tensor) -> Tensor:
        return product(v) if v.ndim == 1 else torch.stack([product(column) for column in v.unbind(1)], 1)

    return columns


def curvlinops_operator(kind: str, model: nn.Module, loss_fn: nn.Module, data: Batches) -> Any:
    """Curvlinops' linear operator, "Hessian", "GGN" or "EF"; it multiplies matrices, too."""
    operator = getattr(load("curvlinops"), f"{kind}LinearOperator")
    return operator(model, loss_fn, trainable(model), data, check_deterministic=False)


def eigenthings_operator(kind: str, model: nn.Module, loss_fn: Any, data: Batches, **options: Any) -> Any:
    """hessian-eigenthings' operator, "Hessian" or "GGN"."""
    operators, losses = load("hessian_eigenthings.operators"), load("hessian_eigenthings.loss_fns")
    if kind == "Hessian":
        return operators.HessianOperator(model, data, losses.supervised_loss(loss_fn), **options)
    parts = losses.supervised_forward, losses.supervised_loss_of_output(loss_fn)
    return operators.GGNOperator(model, data, *parts, **options)


def pyhessian_hessian(model: nn.Module, loss_fn: Any, data: Batches) -> Any:
    """PyHessian's object; with one batch it keeps the graph of the gradient."""
    source = {"data": data[0]} if len(data) == 1 else {"dataloader": data}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        return load("pyhessian").hessian(model, loss_fn, cuda=False, **source)


def pyhessian_product(kind: str, model: nn.Module, loss_fn: Any, data: Batches) -> Product:
    """Its products, taken out of its power iteration."""
    if kind != "Hessian":
        raise NotImplementedError("PyHessian knows the Hessian alone")
    hessian, utils = pyhessian_hessian(model, loss_fn, data), load("pyhessian.utils")

    def product(v: Tensor) -> Tensor:
        parts = split(v, hessian.params)
        if len(data) == 1:
            return flat(utils.hessian_vector_product(hessian.gradsH, hessian.params, parts))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
            return flat(hessian.dataloader_hv_product(parts)[1])

    return by_column(product)


def backpack_product(kind: str, model: nn.Module, loss_fn: Any, data: Batches) -> Product:
    """Backpack's products; batches are weighted by their sizes here, for it knows graphs, not data."""
    free = {"Hessian": "hvp", "GGN": "ggnvp"}
    module = load(f"backpack.hessianfree.{free[kind]}")
    rows = sum(len(y) for _, y in data)

    def term(x: Tensor, y: Tensor, parts: list[Tensor]) -> Tensor:
        output = model(x)
        loss = loss_fn(output, y)
        if kind == "Hessian":
            return flat(module.hessian_vector_product(loss, trainable(model), parts))
        return flat(module.ggn_vector_product(loss, output, model, parts))

    def product(v: Tensor) -> Tensor:
        parts = split(v, trainable(model))
        total = torch.zeros_like(v)
        for x, y in data:
            total += term(x, y, parts).detach() * (len(y) / rows)
        return total

    return by_column(product)


def product(peer: str, kind: str, model: nn.Module, loss_fn: Any, data: Batches) -> Product:
    """The product of one library, for (n,) and (n, k).

    Raises:
        NotImplementedError: it has no such operator.
    """
    if peer == "curvlinops":
        operator = curvlinops_operator(kind, model, loss_fn, data)
        return lambda v: operator @ v
    if peer == "hessian-eigenthings":
        return by_column(eigenthings_operator(kind, model, loss_fn, data).matvec)
    if peer == "PyHessian":
        return pyhessian_product(kind, model, loss_fn, data)
    return backpack_product(kind, model, loss_fn, data)
