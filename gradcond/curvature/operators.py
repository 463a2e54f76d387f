"""What every curvature operator shares, and how anything symmetric becomes one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

# largest asymmetry, relative to the norm, that rounding can explain; real mistakes are near 1
ASYMMETRY = {torch.float64: 1e-5, torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of vectors: float64 stays, everything shorter is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shortest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one with the fewest digits."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


class Operator(ABC):
    """A symmetric matrix known by its products: ``A @ v`` for v of shape (n,) or (n, k).

    Subclasses define ``_columns(V)``, the product with the columns of V, both (n, k) in the working dtype
    (float64 for a float64 operator, float32 otherwise).

    ``A + B``, ``A - B``, ``c * A``, ``A / c``, ``-A``, ``A.shift(s)`` and ``A.block(index)`` are operators again; B
    may be a dense matrix or a SciPy operator too, on either side. They keep no copy: a product of the
    result is one product of each operator that it is made of.

    Attributes:
        shape: (n, n).
        num_matvecs: products with single vectors so far.
        chunk: most columns of one product; more are multiplied in turn, which bounds the memory. None sets no
            limit. What an operator is made of hands its smallest chunk on.
        parts: the operators that its products are made of.

    Example:
        >>> class Twice(Operator):
        ...     def _columns(self, V): return 2 * V
        >>> A = Twice(3, torch.float32, torch.device("cpu"))
        >>> A @ torch.tensor([1.0, 2.0, 3.0]), A.num_matvecs
        (tensor([2., 4., 6.]), 1)
        >>> (A / 4 + torch.diag(torch.tensor([0.0, 0.0, 1.0]))) @ torch.ones(3)
        tensor([0.5000, 0.5000, 1.5000])
    """

    __array_ufunc__ = None  # leaves array + A to A.__radd__

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, *, parts: Sequence[Operator] = ()) -> None:
        self.shape = (n, n)
        self.dtype = dtype
        self.device = device
        self.num_matvecs = 0
        self.parts = tuple(parts)
        self.chunk = min((A.chunk for A in parts if A.chunk is not None), default=None)

    @property
    def chunk(self) -> int | None:
        """Most columns of one product, None for all."""
        return self._chunk

    @chunk.setter
    def chunk(self, columns: int | None) -> None:
        if columns is not None and not (isinstance(columns, int) and columns >= 1):
            raise ValueError(f"chunk must be None or a whole number of columns, at least 1, got {columns!r}")
        self._chunk = columns

    @abstractmethod
    def _columns(self, V: Tensor) -> Tensor: ...

    @property
    def precision(self) -> torch.dtype:
        """The shortest dtype in which products are computed: how exact they are."""
        return shortest([self.dtype, *(A.precision for A in self.parts)])

    def __matmul__(self, v: Tensor) -> Tensor:
        v = self._checked(v)
        V = v.detach().to(working_dtype(self.dtype)).reshape(self.shape[0], -1)
        if V.shape[1] == 0:
            return v.clone()
        self.num_matvecs += V.shape[1]
        if self.chunk is None or V.shape[1] <= self.chunk:
            return self._columns(V).reshape(v.shape).to(v.dtype)
        result = torch.empty_like(v)
        for own, out in zip(V.split(self.chunk, 1), result.split(self.chunk, 1), strict=True):
            out.copy_(self._columns(own))
        return result

    def __add__(self, other: Any) -> Operator:
        """A + B; A + 0 is A, so that sum() works."""
        return self if isinstance(other, int) and other == 0 else _combined((1.0, self), (1.0, other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Operator:
        """A - B."""
        return _combined((1.0, self), (-1.0, other))

    def __rsub__(self, other: Any) -> Operator:
        """B - A."""
        return _combined((1.0, other), (-1.0, self))

    def __mul__(self, c: Any) -> Operator:
        """The multiple c A, for a number c."""
        return _combined((c, self))

    __rmul__ = __mul__

    def __truediv__(self, c: Any) -> Operator:
        """A / c, for a number c."""
        return _combined((1 / c, self))

    def __neg__(self) -> Operator:
        """-A."""
        return _combined((-1.0, self))

    def shift(self, s: float) -> Operator:
        """A + s I, whose eigenvalues are those of A plus s."""
        return _combined((1.0, self), shift=s)

    def block(self, index: Any, /) -> Any:
        """The principal sub-block A[index, index]: a slice, a mask (n,), or whole numbers, each once."""
        from gradcond.curvature.composed import Block

        return Block(self, index)

    def check_deterministic(self) -> float:
        """The largest relative difference of two equal products, among the operators that it is made of.

        Raises:
            ValueError: one of them differs by more than rounding explains.
        """
        return max((A.check_deterministic() for A in self.parts), default=0.0)

    def _checked(self, v: Tensor) -> Tensor:
        n, accepted = self.shape[0], {self.dtype, working_dtype(self.dtype)}
        if not isinstance(v, Tensor):
            raise TypeError(f"expected a torch tensor, got {type(v).__name__}; for NumPy use to_scipy()")
        if v.ndim not in (1, 2) or v.shape[0] != n:
            raise ValueError(f"expected a vector of shape ({n},) or ({n}, k), got {tuple(v.shape)}")
        if v.dtype not in accepted or v.device != self.device:
            raise ValueError(
                f"expected a {self.dtype} vector on {self.device}, got {v.dtype} on {v.device}; "
                "convert it with v.to(H.device, H.dtype)"
            )
        return v

    def to_dense(self, chunk: int = 64, progress: Callable[[int], Any] | None = None) -> Tensor:
        """All n columns, ``chunk`` at a time: (n, n), for small n and for tests.

        ``progress`` is called with the number of products just done.
        """

        def product(columns: Tensor) -> Tensor:
            result = self @ columns
            if progress is not None:
                progress(columns.shape[1])
            return result

        return written_out(product, self.shape[0], working_dtype(self.dtype), self.device, chunk).to(self.dtype)

    def to_scipy(self) -> LinearOperator:
        """The same operator for SciPy: NumPy vectors in, NumPy vectors out."""
        as_numpy = np.float64 if working_dtype(self.dtype) == torch.float64 else np.float32

        def product(v: np.ndarray) -> np.ndarray:
            if np.iscomplexobj(v):
                return product(v.real) + 1j * product(v.imag)
            v = np.require(v, as_numpy, ["C", "W"])  # of any strides, and perhaps read-only
            return (self @ torch.from_numpy(v).to(self.device)).cpu().numpy()

        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, dtype=as_numpy)


def written_out(
    product: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype, device: torch.device, chunk: int
) -> Tensor:
    """The matrix (n, n) of a product with (n, k), from its columns, ``chunk`` at a time."""
    dense = torch.empty(n, n, dtype=dtype, device=device)
    for start in range(0, n, chunk):
        columns = torch.zeros(n, min(chunk, n - start), dtype=dtype, device=device)
        columns[start : start + chunk].fill_diagonal_(1)
        dense[:, start : start + chunk] = product(columns)
    return dense


def _combined(*terms: tuple[Any, Any], shift: Any = 0.0) -> Operator:
    from gradcond.curvature.composed import Combination

    return Combination(terms, shift)


class Products:
    """Anything square and symmetric as a function of torch vectors that counts its products."""

    def __init__(self, A: Any, progress: Callable[[int], Any] | None = None) -> None:
        shape = getattr(A, "shape", None)
        if shape is None or not hasattr(A, "__matmul__"):
            raise TypeError(f"expected a square operator with shape and @, got {type(A).__name__}")
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise ValueError(f"expected a square symmetric operator, got shape {tuple(shape)}")
        if isinstance(A, np.ndarray):
            A = torch.from_numpy(np.require(A, requirements=["C", "W"]))
        elif not hasattr(A, "device"):
            A = _FromSciPy(aslinearoperator(A)) if hasattr(A, "dot") else A
        self.A, self.n, self.progress, self.count = A, int(shape[0]), progress, 0
        self.dtype: torch.dtype = getattr(A, "dtype", torch.get_default_dtype())
        self.device = torch.device(getattr(A, "device", "cpu"))
        if self.dtype not in ASYMMETRY:
            raise ValueError(f"expected a real floating-point operator, got {self.dtype}; convert it first")
        self.work_dtype = working_dtype(self.dtype)
        self.precision: torch.dtype = getattr(A, "precision", self.dtype)
        self.eps = torch.finfo(self.precision).eps
        if isinstance(A, Tensor):
            A = self.A = A.detach().to(self.work_dtype)
        if isinstance(A, Tensor) and A.layout == torch.strided:
            self.check_symmetry(float((A - A.mT).abs().max()), float(A.abs().max()))
        elif hasattr(A, "check_deterministic"):
            A.check_deterministic()

    def __call__(self, v: Tensor) -> Tensor:
        """A v for v (n,) or (n, k), in the working dtype, counted."""
        product = self.A @ v
        if not isinstance(product, Tensor) or product.shape != v.shape:
            got = f"shape {tuple(product.shape)}" if isinstance(product, Tensor) else type(product).__name__
            raise ValueError(f"expected a product that is a tensor of shape {tuple(v.shape)}, got {got}")
        product = product.detach().to(self.work_dtype)
        columns = 1 if v.ndim == 1 else v.shape[1]
        self.count += columns
        if self.progress is not None:
            self.progress(columns)
        return product

    def check_symmetry(self, asymmetry: float, scale: float) -> None:
        """Raise unless |<u, A v> - <A u, v>| is rounding beside the scale of A."""
        if not math.isfinite(asymmetry) or not math.isfinite(scale):
            raise ValueError("the operator returned NaN or infinity; check the loss and the parameters")
        if asymmetry > ASYMMETRY[self.precision] * scale:
            raise ValueError(
                f"expected a symmetric operator, but <u, A v> and <A u, v> differ by {asymmetry / scale:.1e} "
                "of its size: it is not symmetric, or its products are not repeatable (dropout, random "
                "augmentation, BatchNorm on shuffled batches)"
            )

    def gaussian(self, generator: torch.Generator) -> Tensor:
        """A standard normal vector (n,), drawn on the CPU so that every device sees the same one."""
        return normal(self.n, generator).to(self.device, self.work_dtype)


class _FromSciPy:
    """A SciPy operator that multiplies torch vectors."""

    def __init__(self, A: LinearOperator) -> None:
        self.A, self.shape, self.device = A, A.shape, torch.device("cpu")
        real = torch.float32 if A.dtype == np.float32 else torch.float64
        self.dtype = torch.complex128 if np.issubdtype(A.dtype, np.complexfloating) else real

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.A @ v.numpy()))


def generator_from(seed: int) -> torch.Generator:
    """A generator of its own, on the CPU: the same numbers on every device, the global state untouched."""
    return torch.Generator().manual_seed(seed)


def normal(n: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers (n,), float64 on the CPU: the same on every device."""
    return torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")


def signs(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Random signs (n, count), int8 on the CPU."""
    return torch.randint(0, 2, (n, count), generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
