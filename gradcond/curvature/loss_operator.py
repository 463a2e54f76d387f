"""What the curvature operators of a model share: one pass over the data, weighted and isolated."""

from __future__ import annotations

import copy
import fnmatch
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.curvature.culprit import culprit
from gradcond.curvature.objective import Mean, Objective, Share, divisor, require_one_kind
from gradcond.curvature.operators import ASYMMETRY, Operator, generator_from, normal, shortest, working_dtype
from gradcond.curvature.passes import Draws, batches, call, left_as_found, num_batches, unwrap
from gradcond.curvature.processes import Processes
from gradcond.curvature.products import (
    METHODS,
    Parts,
    Probe,
    Product,
    Trial,
    fastest_together,
    grad,
    probe,
    require_derivatives,
)
from gradcond.curvature.sketch import relative_difference, sketch
from gradcond.curvature.snapshot import Snapshot
from gradcond.curvature.vectors import Sum, parts_of, stacked

TOGETHER = 16, 64  # columns of one vectorized backward pass, and where few numbers are multiplied
TRIAL = 4, 8  # of the one that tells whether such passes are faster
QUICK = 2e-3  # seconds of a product on the CPU: where several take little memory
Places = Sequence[int] | None  # of parameters among those of an operator, None for all


class Evaluation:
    """One batch of the objective, evaluated as often as a product needs, each time on the same random draws."""

    def __init__(
        self, model: nn.Module, objective: Objective, batch: Any, parameters: Sequence[Tensor] = ()
    ) -> None:
        self.model, self.objective, self.batch, self.parameters = model, objective, batch, parameters
        self.share: Share | None = None  # of the batch in the mean, once it has been evaluated
        self.once = False  # it is evaluated no more than once from now on
        self.frees = False  # and its graph is for a single product
        self.moving: list[bool] = []  # which tensors of the output depend on the parameters
        self.noise: Tensor | None = None  # what a Monte-Carlo operator drew for it
        self.start = 0  # and its place among the numbers drawn for all data
        self._draws: Draws | None = None

    def __call__(
        self, function: Callable[[nn.Module, Any], Any], parameters: Mapping[str, Tensor] | None = None
    ) -> Any:
        """``function(model, batch)``, with other parameters where they are given."""
        if self._draws is not None:
            self._draws.restore()
        elif not self.once:
            self._draws = Draws()
        return call(function, self.model, self.batch, parameters or {}, self.objective.modules)

    def loss(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The numerator of the batch, a scalar."""

        def of_batch(model: nn.Module, batch: Any) -> tuple[Tensor, Share]:
            return self.objective.of(self.objective.output(model, batch), batch)

        value, self.share = self(of_batch, parameters)
        return value


@dataclass
class Kept:
    """A product with its graph, and all that it depends on."""

    snapshot: Snapshot
    product: Product
    share: Share | None
    parameters: Sequence[Tensor]
    only_torch: bool = False  # whether a product has shown to draw nothing from other generators than torch's

    @functools.cached_property
    def divisor(self) -> Any:
        """What the product is divided by where this batch is all."""
        assert self.share is not None
        return divisor(*Mean(self.share).sums)


def _form(p: Tensor) -> tuple[Any, ...]:
    """What of a parameter must stay as it is."""
    return p.shape, p.dtype, p.device


class LossOperator(Operator):
    """A matrix over the trainable parameters that is a mean over batches.

    Subclasses define the product with the matrix of one batch by two methods, ``_double_backward`` and
    ``_forward_over_reverse``; both set the share of the batch.
    """

    _long = 0.05  # seconds of a product on the CPU: several in one pass gain no time
    _forward_costs = 1.0  # what the latter takes at least, in times of what building the graph of the former takes

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Iterable[Any],
        *,
        weight_fn: Callable[[Any], Any] | None = None,
        method: str = "auto",
        chunk: int | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        if method not in METHODS:
            raise ValueError(f"expected method in {METHODS}, got {method!r}")
        self.model, self.loss_fn, self.objective = unwrap(model), loss_fn, Objective(loss_fn, weight_fn)
        self.data: Iterable[Any] = list(data) if isinstance(data, Iterator) else data
        self.processes = Processes(process_group)
        if num_batches(data) == 0 and not self.processes.several:
            raise ValueError("expected at least one batch, got an empty data set")
        self.method = method
        for name, p in self.model.named_parameters():
            if hasattr(p, "device_mesh"):
                raise TypeError(
                    f"expected whole parameters, but {name!r} is sharded (a DTensor); load the full state into a "
                    "plain model: torch.distributed.checkpoint.state_dict gathers it with full_state_dict=True"
                )
        self._forms = {name: _form(p) for name, p in self.model.named_parameters() if p.requires_grad}
        self.names = list(self._forms)
        if not self.names:
            raise ValueError("expected a model with trainable parameters, but none requires grad")
        self._take_shape()
        self.chunk = chunk
        self._noise: float | None = None
        self._seed = 0

    def _take_shape(self) -> None:
        dtype = self.parameters[0].dtype
        for p in self.parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        if dtype not in ASYMMETRY:
            raise ValueError(f"expected real floating-point parameters, got {dtype}")
        super().__init__(sum(p.numel() for p in self.parameters), dtype, self.parameters[0].device)
        self.probe: Probe | None = None  # how products are computed, and why, after the first one
        self._way: int | None = None  # in which several columns go in one pass, where they do
        self._tried = 0  # with how many it was tried
        self._kept: Kept | None = None
        self._looked_through = False
        self.made_by: Any = None  # what makes the products in its place, together with those of other blocks

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of ``names``, in their order.

        Raises:
            ValueError: one of them is gone, frozen, or of another shape, dtype or device by now.
        """
        forms = {name: (_form(p), p) for name, p in self.model.named_parameters() if p.requires_grad}
        for name in self.names:
            if name not in forms or forms[name][0] != self._forms[name]:
                raise ValueError(
                    f"expected the parameters that the operator was made with, but {name!r} is gone, frozen, or of "
                    "another shape, dtype or device; make a new operator"
                )
        return [forms[name][1] for name in self.names]

    @property
    def precision(self) -> torch.dtype:
        """The shortest dtype among those of all parameters, frozen ones too, and of autocast where it is on."""
        own = [p.dtype for p in self.model.parameters() if p.dtype in ASYMMETRY]
        if torch.float32 in own and torch.is_autocast_enabled(self.device.type):
            own.append(torch.get_autocast_dtype(self.device.type))
        return shortest(own)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in a vector: ``v[H.slices[name]].view(shape)``."""
        ends = torch.tensor([p.numel() for p in self.parameters], device="cpu").cumsum(0).tolist()
        return {name: slice(start, end) for name, start, end in zip(self.names, [0, *ends], ends, strict=False)}

    def block(self, *which: Any) -> Operator:
        """The diagonal block of the parameters whose names match a glob pattern, or of an index as for any matrix.

        The block of whole parameters costs what the block needs, not a product of the whole.

        >>> from gradcond.curvature import Hessian
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> H = Hessian(model, torch.nn.MSELoss(), [(torch.ones(4, 2), torch.zeros(4, 1))])
        >>> H.names, H.block("1.*").names, H.block("*.weight").shape, H.block([0, 2]).shape
        (['0.weight', '0.bias', '1.weight', '1.bias'], ['1.weight', '1.bias'], (9, 9), (2, 2))

        Raises:
            ValueError: a pattern matches none of ``names``; an index is not as expected.
        """
        if not which or not all(isinstance(pattern, str) for pattern in which):
            block = super().block(*which)
            names = self._whole(block.index)
            return block if names is None else self._of(names)
        for pattern in which:
            if not fnmatch.filter(self.names, pattern):
                raise ValueError(f"no parameter matches {pattern!r}; expected a pattern for some of {self.names}")
        return self._of([name for name in self.names if any(fnmatch.fnmatchcase(name, p) for p in which)])

    def _whole(self, index: Tensor) -> list[str] | None:
        """The parameters that an index goes through whole and in order, None where it does not."""
        held = torch.zeros(self.shape[0], dtype=torch.bool, device="cpu")
        held[index.cpu()] = True
        names = [name for name, own in self.slices.items() if bool(held[own].all())]
        count = sum(own.stop - own.start for name, own in self.slices.items() if name in names)
        return names if count == len(index) and bool((index.diff() > 0).all()) else None

    def _of(self, names: list[str]) -> LossOperator:
        block = copy.copy(self)
        block.names = names
        block._take_shape()
        block.chunk = self.chunk
        return block

    def release(self) -> None:
        """Frees the graph that is kept between the products with a single batch; the next one builds it again."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # graphs are not copied

    def __repr__(self) -> str:
        how = self.method if self.probe is None else f"{self.probe.method}: {self.probe.reason}"
        for name, seconds in ({} if self.probe is None else self.probe.seconds).items():
            how += f"; {name} {seconds:.2g} s a batch"
        return f"{type(self).__name__}(n={self.shape[0]}, {self.dtype}, {how})"

    def loss(self) -> Tensor:
        """The loss on all batches concatenated, a scalar."""
        return self._mean(lambda evaluation: [[evaluation.loss().view(1, 1)]], 1)[0]

    def gradient(self) -> Tensor:
        """Its gradient (n,), in the working dtype."""

        def of_batch(evaluation: Evaluation) -> Iterator[Parts]:
            yield [g.reshape(1, -1) for g in grad([evaluation.loss()], evaluation.parameters)]

        return self._mean(of_batch, self.shape[0])

    def check_deterministic(self) -> float:
        """The relative difference of two products of the same vector, under different random states.

        Costs two products, once per operator: eigsh, spectral_density, condition_number, trace and diagonal
        call it before they start. ``num_matvecs`` of the operator counts them, that of the results does not.

        Raises:
            ValueError: the products differ by more than rounding explains.
        """
        if self._noise is None:
            v = normal(self.shape[0], generator_from(0)).to(self.device, working_dtype(self.dtype))
            self._seed = 1
            try:
                other = sketch([self @ v])
            finally:
                self._seed = 0
            # after it: the graph that it keeps is that of the products to come
            noise = relative_difference([other], [sketch([self @ v])])
            if noise > ASYMMETRY[self.precision]:
                raise ValueError(
                    f"two products of the same vector differ by {noise:.1e} of their size; {self._culprit()}"
                )
            self._noise = noise
        return self._noise

    def _culprit(self) -> str:
        return culprit(self.model, self.data, self._drawn, lambda batch: self._evaluation(batch).loss())

    @contextmanager
    def _drawn(self, seed: int) -> Iterator[Iterator[Any]]:
        """The batches of one pass, every random state set from the seed; all is left as found afterwards."""
        with left_as_found(self.model, self.model.parameters(), self.data, seed):
            yield batches(self.data, self.device, self.objective.takes_pairs)

    def _evaluation(self, batch: Any, parameters: Sequence[Tensor] = ()) -> Evaluation:
        return Evaluation(self.model, self.objective, batch, parameters)

    def _settings(self) -> tuple[int, ...]:
        """What else the matrix of a batch depends on."""
        return ()

    @abstractmethod
    def _double_backward(self, evaluation: Evaluation) -> Product: ...

    @abstractmethod
    def _forward_over_reverse(self, evaluation: Evaluation) -> Product: ...

    def _columns(self, V: Tensor) -> Tensor:
        return self._together([(None, V)])[0] if self.made_by is None else self.made_by.ask(self.names, V)

    def _together(self, asked: Sequence[tuple[Places, Tensor]]) -> list[Tensor]:
        """Products in one pass over the data: of V (n, k) with all parameters, or with the block of some."""
        sizes = [V.numel() for _, V in asked]

        def rows(product: Product, parameters: Sequence[Tensor]) -> Iterator[Parts]:
            for places, V in asked:
                yield from self._rows(product, V, parameters, places)

        def of_batch(evaluation: Evaluation) -> Iterator[Parts]:
            product = self._product(evaluation, sum(V.shape[1] for _, V in asked))
            return rows(product, evaluation.parameters)

        kept = self._kept
        if kept is None or not self._is_alone or not kept.snapshot.holds(*self._things(self.data)):
            total = self._mean(of_batch, sum(sizes))
        else:
            added = self._sum(sum(sizes))
            # a backward pass may draw, too
            with left_as_found(self.model, kept.parameters, self.data, self._seed, kept.only_torch):
                before = None if kept.only_torch else Draws()
                added.add(rows(kept.product, kept.parameters))
                # the whole product, for that of a block needs no more than a part of the graph
                whole = any(places is None for places, _ in asked)
                kept.only_torch = before is None or (whole and before.only_torch_since())
                total = added().div_(kept.divisor)
        return [part.view(V.shape[1], -1).mT for (_, V), part in zip(asked, total.split(sizes), strict=True)]

    def _sum(self, size: int) -> Sum:
        return Sum(size, working_dtype(self.dtype), self.device)

    def _mean(self, of_batch: Callable[[Evaluation], Iterable[Parts]], size: int) -> Tensor:
        """The sum over all batches of all processes of rows of ``size`` numbers, over the weight of all."""
        mean, added, error = Mean(), self._sum(size), None
        try:
            with self._drawn(self._seed) as drawn:
                parameters = self.parameters
                for batch in drawn:
                    weight = self.objective.weight(batch)
                    if weight is None or float(weight) != 0:
                        evaluation = self._evaluation(batch, parameters)
                        added.add(of_batch(evaluation))
                        assert evaluation.share is not None
                        mean.shares.append(evaluation.share)
            mean.check()
        except Exception as caught:
            if not self.processes.several:
                raise
            error = caught
        total, sums = added(), mean.sums
        if self.processes.several:
            kinds = self.processes.agree(self._same() if error is None else None, mean.kinds)
            total, sums = self._add_up(total, sums, error)
            require_one_kind(kinds)
        return total.div_(divisor(*sums))

    def _add_up(self, total: Tensor, numbers: list[Any], error: Exception | None) -> tuple[Tensor, list[Any]]:
        """The sums over all processes."""
        return self.processes.add_up(total, numbers, error)

    def _same(self) -> dict[str, Any]:
        """What must be the same on every process."""
        norms = torch.stack([p.detach().double().norm() for p in self.parameters])
        return {"kind": type(self).__name__, "parameters": float(norms.norm()), "names": tuple(self.names)}

    def _product(self, evaluation: Evaluation, columns: int) -> Product:
        """The product with the matrix of a batch; the graph of a single batch is kept until something changes."""
        if num_batches(self.data) != 1 or self._goes_forward:
            return self._built(evaluation, once=columns == 1)
        things = self._things(self.data if self._is_fixed else evaluation.batch)
        kept = self._kept
        if kept is None or not kept.snapshot.holds(*things):
            self._kept = kept = None
            snapshot, product = Snapshot(*things), self._built(evaluation, once=False)
            if self._goes_forward:
                return product
            self._kept = kept = Kept(snapshot, product, evaluation.share, evaluation.parameters)
        evaluation.share = kept.share
        return kept.product

    def _built(self, evaluation: Evaluation, once: bool) -> Product:
        """By the method that the first product chose; ``once``: the product is not asked for a second time."""
        product = None
        if self.probe is None:
            self.probe, product = self._probe(evaluation)
        evaluation.once, evaluation.frees = once or not self._goes_forward, once
        if self._goes_forward:
            return self._forward_over_reverse(evaluation)
        return self._double_backward(evaluation) if product is None else product

    @property
    def _goes_forward(self) -> bool:
        return self.probe is not None and self.probe.method == "forward_over_reverse"

    @property
    def _is_fixed(self) -> bool:
        """The data are the same objects in every pass."""
        return type(self.data) in (list, tuple)

    @property
    def _is_alone(self) -> bool:
        """A product is that of the data here, and nothing else."""
        return self._is_fixed and not self.processes.several

    def _things(self, batch: Any) -> tuple[Any, ...]:
        """What the matrix of a batch depends on."""
        loss, device = self.objective.loss, self.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return (
            *(self.model, loss.loss_fn, loss.output, loss.target, self.objective.weight_fn, batch, self.names),
            *(self._seed, *autocast, *self._settings()),
        )

    def _look_through(self, gradients: Sequence[Tensor]) -> None:
        """At the graph that second derivatives are taken of, once."""
        if not self._looked_through:
            require_derivatives(gradients)
            self._looked_through = True

    def _probe(self, evaluation: Evaluation) -> tuple[Probe, Product | None]:
        if self.method == "double_backward":
            return Probe(self.method, "asked for"), None
        trial = Trial(
            lambda: self._double_backward(evaluation),
            self._forward_over_reverse(evaluation),
            self._random(evaluation.parameters),
            keeps=num_batches(self.data) == 1,
            costs=self._forward_costs,
        )
        return probe(trial, self.method, self.precision)

    def _random(self, parameters: Sequence[Tensor], *columns: int) -> list[Tensor]:
        """A vector for a trial, or several stacked: a wrong derivative does not hide from it."""
        generator, dtype = generator_from(0), working_dtype(self.dtype)
        # each its own memory: tangents that are views of a vector would be copied
        options: Any = {"generator": generator, "dtype": dtype, "device": "cpu"}
        drawn = [torch.randn((*columns, *p.shape), **options) for p in parameters]
        return [part.to(p) for part, p in zip(drawn, parameters, strict=True)]

    def _rows(
        self, product: Product, V: Tensor, parameters: Sequence[Tensor], places: Places
    ) -> Iterator[list[Tensor]]:
        """The product with each column of V (n, k), as rows in parts (c, numbers), c at a time.

        Several go in one pass where that is faster than one by one.
        """
        if places is not None:
            product, parameters = functools.partial(product, places=places), [parameters[i] for i in places]
        together = self._together_by(product, V, parameters) if V.shape[1] > 1 and self.method == "auto" else None
        if together is not None:
            for columns in V.split(TOGETHER[self._is_quick], 1):
                rows = columns.shape[1]
                yield [part.reshape(rows, -1) for part in together(stacked(columns, parameters), True)]
        else:
            for column in V.unbind(1):
                yield [part.reshape(1, -1) for part in product(parts_of(column, parameters), False)]

    def _together_by(self, product: Product, V: Tensor, parameters: Sequence[Tensor]) -> Product | None:
        """The product that takes the columns of V at a time, None where they go one by one."""
        ways, columns = self._ways(product), min(V.shape[1], TRIAL[self._is_quick])
        if ways and self._way is None and self._tried < columns and self._seconds < self._long:
            trial = self._random(parameters, columns)
            self._way, self._tried = fastest_together(product, ways, trial, self.precision), columns
        return None if self._way is None else ways[self._way]

    def _ways(self, product: Product) -> list[Product]:
        """Products to try with several columns in one pass."""
        return [] if self._goes_forward else [product]

    @property
    def _is_quick(self) -> bool:
        """Products are short for want of work, not for want of a slow processor."""
        return 0 < self._seconds < QUICK

    @property
    def _seconds(self) -> float:
        """What a product with a batch takes on the CPU, 0 where it is not known."""
        seconds = {} if self.probe is None or self.device.type != "cpu" else self.probe.seconds
        return min(seconds.values(), default=0.0)
