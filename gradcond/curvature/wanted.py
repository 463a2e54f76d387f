"""Which eigenvalues are asked for, and the chance that some of them hide."""

from __future__ import annotations

import numpy as np
from scipy.special import gammainc

WHICH = ("LA", "SA", "LM", "BE")


def wanted(values: np.ndarray, k: int, which: str) -> np.ndarray:
    """Indices of the k values asked for, the most extreme first; of BE the upper ones, then the lower ones."""
    if which == "BE":
        order = np.argsort(values, kind="stable")
        return np.concatenate([order[::-1][: k - k // 2], order[: k // 2]])
    keys = {"LA": -values, "SA": values, "LM": -np.abs(values)}[which]
    return np.argsort(keys, kind="stable")[:k]


def neighbours(values: np.ndarray, k: int, which: str, count: int) -> np.ndarray:
    """Indices of the k values asked for and of those that a restart keeps beside them, count in all.

    Of the others, half are the next ones and half come from the far end: an outlier there slows the rest.
    """
    far = (count - k) // 2 if which in ("LA", "SA") else 0
    order = wanted(values, len(values), which)
    near = wanted(values, count - far, which)
    return np.concatenate([near, order[len(order) - far :]])


def edges(values: np.ndarray, which: str, margin: float) -> list[float]:
    """The least extreme eigenvalues whose copies would be among the wanted ones, from those in order.

    A copy of the last wanted value would not: it changes nothing. So there is none for k = 1.
    """
    upper = len(values) - len(values) // 2
    ends = {
        "LA": [(1, values)],
        "SA": [(-1, -values)],
        "LM": [(1, np.abs(values)), (-1, np.abs(values))],
        "BE": [(1, values[:upper]), (-1, -values[upper:])],
    }[which]
    above = [(sign, keys[keys > keys.min() + margin]) for sign, keys in ends if len(keys)]
    return [sign * float(keys.min()) for sign, keys in above if len(keys)]


def hiding_chance(T: np.ndarray, coupling: np.ndarray, width: int, point: float, n: int) -> float:
    """The chance that an eigenvalue at this point is unseen by the Krylov space of ``width`` random vectors.

    Its eigenvector u has the components x = Q^T u there, (T x)_i = point x_i wherever A does not leave the
    space. So the first ``width`` of them, g / sqrt(n) with g standard normal, give the others, y = G g, and
    |x| <= 1 says g^T (1 + G^T G) g <= n. For one vector 1 + G^T G is the sum of the squared orthonormal
    polynomials, the inverse Christoffel function.

    Args:
        T: A within the space, (m, m), which begins with the random vectors.
        coupling: what leaves it, (m, pending).
        width: how many random vectors, at most m.
        point: the eigenvalue.
        n: the dimension that the vectors were drawn in.

    References:
        N. I. Akhiezer, The Classical Moment Problem, 1965, section 2.2.
    """
    inside = np.abs(coupling).sum(1) == 0
    equations = (T - point * np.eye(len(T)))[inside]
    growth = np.linalg.lstsq(equations[:, width:], -equations[:, :width], rcond=None)[0]
    least = np.linalg.svd(growth, compute_uv=False)[-1] if len(growth) >= width else 0.0
    return float(gammainc(width / 2, n / (2 * (1 + least**2))))
