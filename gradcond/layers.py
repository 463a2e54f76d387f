"""How each module type shows its gradient as rows and its input as columns; `register_layer` adds a type.

Every supported weight is seen as (groups, out, in, *taps): `out` output units in each group, each with a row
of `in x taps` weights. The output axis comes from the module's type, never from the shape of a tensor, and all
of it is views, so that any memory format keeps its strides. Only where several parameters make one row, as in
recurrent networks, is it a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

__all__ = ["Layer", "Rows", "find_layers", "register_layer"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


class Rows(NamedTuple):
    """A layer's gradient (or any vector of its parameters), one row [bias, weights] per output unit."""

    weight: Tensor  # (..., groups, out, in, *taps)
    bias: Tensor | None  # (..., groups, out)


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
    """What most layers are applied to: their call's first argument; None where a subclass is called otherwise."""
    x = args[0] if args else kwargs.get("input")
    return x if isinstance(x, Tensor) else None


class Layer:
    """A weight with rows, the biases beside it and the input that it is applied to.

    A module has one of them, or several: an adapter for `register_layer` says which.

    Args:
        name: of the module in the model; from an adapter, of the layer in its module, "" for the only one.
        module: whose calls show the inputs.
        weight: name of the weight in the module, dots for submodules; several names, when the layer's input is
            their inputs side by side.
        bias: likewise; names of parameters that are not there are passed over. The sum of several biases is
            one direction, which they share equally.
        observe: the layer's input from one call (module, args, kwargs, output): a tensor of shape
            (..., inputs), every leading index one row, for convolutions (batch, inputs, *positions), with the batch
            second where the module says batch_first=False; `statistics.Moments`, where they are known without
            one; None when there is no input to see. The first argument by default.
        span: the rows (start, stop) of the weight and bias that are the layer's; all by default, and where a
            parameter has no more.
        transposed: is the weight, whole and the only one, (in, out / groups, *taps) instead of
            (out, in / groups, *taps)?
        groups: of a grouped convolution inside the module.
        one_hot: are the inputs indices?

    Attributes:
        convolution: is it a convolution, transposed or not?
        groups: number of groups, 1 for all but convolutions.
        inputs: number of input channels (features for Linear), all groups together.
        units: number of output units of one group.
        taps: number of spatial axes of the kernel, 0 for Linear.
        kernel: shape of one (output, input) kernel, () for Linear.
        kernel_size: number of taps of one kernel, 1 for Linear.
        fan_in: length of a row: inputs of the unit's group times kernel_size.

    Example:
        >>> layer = Layer("up", nn.ConvTranspose1d(6, 4, 3, groups=2))
        >>> layer.rows(layer.weight, layer.bias).weight.shape
        torch.Size([2, 2, 3, 3])
        >>> layer.fan_in, layer.inputs
        (9, 6)
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        weight: str | Sequence[str] = "weight",
        bias: str | Sequence[str] = "bias",
        observe: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any] = first_input,
        span: tuple[int, int] | None = None,
        transposed: bool | None = None,
        groups: int | None = None,
        one_hot: bool = False,
    ) -> None:
        self.name = name
        self.module: Any = module
        self.kept: Any = None  # the last map that was made for it, after what it was made from
        self.lookup: Callable[[str], Any] = self._attribute
        self.weight_names = (weight,) if isinstance(weight, str) else tuple(weight)
        biases = (bias,) if isinstance(bias, str) else tuple(bias)
        self.places = {key: self._place(key) for key in self.weight_names + biases}
        self.bias_names = tuple(key for key in biases if self._attribute(key) is not None)
        self.places = {key: self.places[key] for key in self.weight_names + self.bias_names}
        self.observe = observe
        self.span = span
        self.one_hot = one_hot
        self.convolution = isinstance(module, _CONVOLUTIONS)
        self.transposed = isinstance(module, _TRANSPOSED) if transposed is None else transposed
        own: Any = module.groups if self.convolution else 1
        self.groups: int = own if groups is None else groups
        shape = getattr(self._attribute(self.weight_names[0]), "shape", None)
        if shape is None or len(shape) < 2:
            raise ValueError(
                f"expected {type(module).__name__}.{self.weight_names[0]} to be a weight of two axes or more, got "
                f"{'none' if shape is None else f'shape {tuple(shape)}'}; name the parameter by weight="
            )
        self._check_weights()
        first, second, *kernel = shape
        if span is not None:
            first = span[1] - span[0]
        if len(self.weight_names) > 1:
            second = sum(self._attribute(key).shape[1] for key in self.weight_names)
        self.inputs: int = first if self.transposed else second * self.groups
        self.units: int = second if self.transposed else first // self.groups
        self.taps = len(kernel)
        self.kernel = tuple(kernel)
        self.kernel_size = math.prod(kernel)
        self.fan_in = self.inputs // self.groups * self.kernel_size

    def _check_weights(self) -> None:
        """Raises ValueError for weights that do not make rows together, or not those of a span."""
        kind, names = type(self.module).__name__, self.weight_names
        shapes = [tuple(self._attribute(key).shape) for key in names]
        if len({(len(shape), shape[:1], shape[2:]) for shape in shapes}) > 1:
            raise ValueError(
                f"expected the weights {names} of {kind} to differ in their inputs alone, since they make one row, "
                f"got the shapes {shapes}; make layers of their own of them"
            )
        if len(shapes) > 1 and self.groups > 1:
            raise ValueError(
                f"expected {kind} to have one group, since several weights are joined, got groups={self.groups}; "
                "make layers of whole weights"
            )
        if self.transposed and (self.span is not None or len(shapes) > 1):
            why = "several weights are joined" if self.span is None else "span= takes rows of it"
            raise ValueError(
                f"expected {kind}.{names[0]} to be (out, in), since {why}, got transposed=True; make layers of "
                "whole transposed weights"
            )

    def _place(self, key: str) -> tuple[Any, str]:
        *path, leaf = key.split(".")
        return reduce(getattr, path, self.module), leaf

    def _attribute(self, key: str) -> Any:
        module, leaf = self.places[key]
        # past nn.Module.__getattr__: this is asked for at every step
        found = module._parameters.get(leaf)
        return getattr(module, leaf, None) if found is None else found

    @property
    def form(self) -> tuple[Any, ...]:
        """Where its parameters are, and how they are its rows."""
        return self.places, self.span, self.groups, self.inputs, self.units, self.kernel

    def parameters(self) -> list[Any]:
        """All parameters that hold the rows."""
        return [self.lookup(key) for key in self.places]

    @property
    def weights(self) -> list[Any]:
        """The parameters that hold the weight."""
        return [self.lookup(key) for key in self.weight_names]

    @property
    def biases(self) -> list[Any]:
        """The parameters that hold the bias."""
        return [self.lookup(key) for key in self.bias_names]

    @property
    def weight(self) -> Tensor:
        """The weight as `rows` takes it: a view of its parameter, a copy where there are several."""
        return self.join(self.weights)

    @property
    def bias(self) -> Tensor | None:
        """The bias as `rows` takes it, None without one."""
        parts = [self.part(b, -1) for b in self.biases]
        return sum(parts[1:], parts[0]) if parts else None

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """One weight from tensors shaped like the weight parameters, with any number of leading axes."""
        parts = [self.part(w, -2 - self.taps) for w in weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1 - self.taps)

    def part(self, tensor: Tensor, axis: int) -> Tensor:
        """The layer's own rows of a parameter-shaped tensor, a view; a tensor of just those is one as it is."""
        own = self.units * self.groups
        if self.span is None or tensor.shape[axis] == own:
            return tensor
        return tensor.narrow(axis, self.span[0], own)

    def rows(self, weight: Tensor, bias: Tensor | None) -> Rows:
        """Views of a weight- and a bias-shaped tensor as rows; leading batch axes are kept.

        Args:
            weight: shaped like the layer's weight, with any number of leading axes.
            bias: likewise, or None.

        Returns:
            Rows with weight (..., groups, out, in, *taps) and bias (..., groups, out).
        """
        axis = -2 - self.taps
        if self.groups > 1:
            weight = weight.unflatten(axis, (self.groups, -1))
        else:
            weight = weight.unsqueeze(axis - 1)
        if self.transposed:  # (groups, in, out, *taps)
            weight = weight.transpose(axis, axis + 1)
        if bias is not None:
            bias = bias.unflatten(-1, (self.groups, -1)) if self.groups > 1 else bias.unsqueeze(-2)
        return Rows(weight, bias)

    def columns(self, vector: Tensor) -> Tensor:
        """A number per input, or per input and tap, as a vector: shaped to multiply rows."""
        kernel = self.kernel if len(vector) > self.inputs else [1] * self.taps
        return vector.reshape(self.groups, 1, -1, *kernel)

    def channel_axis(self, x: Tensor) -> int:
        """The axis of an input tensor that counts the layer's inputs."""
        return x.dim() - 1 - self.taps


Adapter = Callable[[Any], "Layer | Sequence[Layer] | str"]
_adapters: dict[type | str, Adapter] = {}


def register_layer(kind: type[nn.Module] | str, adapter: Adapter) -> None:
    """Tells how a module type shows its gradient as rows; subclasses are shown likewise.

    Args:
        kind: a module class, or its full name "package.module.Class" where importing it would cost too much.
        adapter: takes a module of that type and returns its Layer or several ones, whose parameters are then
            those of no module inside it; or a text, why it has none. It is called when an optimizer is wrapped.

    Raises:
        TypeError: when kind is no module class or adapter no function; as an optimizer is wrapped, for an adapter
            that returns something else.

    Example:
        A graph convolution is linear in what has been aggregated, which is not what its Linear is called with:

        >>> class GraphConvolution(nn.Module):
        ...     def __init__(self, n_in, n_out):
        ...         super().__init__()
        ...         self.linear = nn.Linear(n_in, n_out, bias=False)
        ...         self.bias = nn.Parameter(torch.zeros(n_out))
        ...     def forward(self, x, adjacency):
        ...         return adjacency @ self.linear(x) + self.bias
        >>> def aggregated(module, args, kwargs, output):
        ...     x, adjacency = args
        ...     return adjacency @ x
        >>> register_layer(GraphConvolution, lambda module: Layer(
        ...     "", module, weight="linear.weight", bias="bias", observe=aggregated))
        >>> list(find_layers(nn.Sequential(GraphConvolution(4, 2))))
        ['0']
    """
    if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"expected a subclass of torch.nn.Module or its full name, got {kind!r}")
    if not callable(adapter):
        raise TypeError(f"expected a function that takes a module and returns its Layer, got {adapter!r:.60}")
    _adapters[kind] = adapter


for _kind in (nn.Linear, *_CONVOLUTIONS):
    register_layer(_kind, lambda module: Layer("", module))


def layers_of(module: nn.Module) -> list[Layer] | str:
    """A module's layers by its adapter, or why it has none."""
    for kind in type(module).__mro__:
        adapter = _adapters.get(kind, _adapters.get(f"{kind.__module__}.{kind.__qualname__}"))
        if adapter is not None:
            break
    else:
        return f"{type(module).__name__} has no adapter"
    if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
        return "its weight has no shape yet (lazy module)"
    found = adapter(module)
    if isinstance(found, str):
        return found
    layers = [found] if isinstance(found, Layer) else found
    if not isinstance(layers, Sequence) or not all(isinstance(layer, Layer) for layer in layers):
        raise TypeError(
            f"expected the adapter of {type(module).__name__} to return a Layer, a list of them, or a text that "
            f"says why it has none, got {found!r:.60}"
        )
    for layer in layers:
        if any(leaf not in owner._parameters for owner, leaf in layer.places.values()):
            return "its weight is computed (parametrized), not a parameter"
        if any(p.is_complex() for p in layer.weights):
            return "its weight is complex"
    return list(layers)


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yields (module name, module, parameter name, parameter) for every place that holds a parameter."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield name, module, key, parameter


def has_lazy(model: nn.Module) -> bool:
    """Does a module still wait for its first input to have its shape?"""
    return any(isinstance(p, UninitializedParameter) for p in model.parameters())


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer of a model whose gradient can be shown as rows, by qualified name.

    A weight or bias that several modules share belongs to none of them: its gradient mixes their inputs.

    Example:
        >>> list(find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.LayerNorm(3))))
        ['0']
    """
    places: dict[int, int] = {}
    for _, _, _, parameter in owners(model):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    claimed: set[int] = set()
    layers = {}
    for name, module in model.named_modules():
        found = layers_of(module)
        if isinstance(found, str):
            continue
        ids = [{id(p) for p in layer.weights + layer.biases} for layer in found]
        for layer, own in zip(found, ids, strict=True):
            if not own & claimed and all(places[i] == 1 for i in own):
                layer.name = ".".join(part for part in (name, layer.name) if part)
                layers[layer.name] = layer
        claimed.update(*ids)
    return layers
