"""One set of Ritz values from several Krylov spaces, with weights that leave one of them out at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from scipy.linalg import block_diag, cholesky, eigh, solve_triangular
from torch import Tensor

from gradcond.curvature.basis import CHUNK
from gradcond.curvature.lanczos import Lanczos

NOISE, ROUNDING = 3, 8  # x what each does to a Ritz value: below, it cannot be told from zero (measured)


def pooled(runs: list[Lanczos]) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values (r,) ascending, the measure each run makes on them (k, r), and residuals |A y - theta y| (r,).

    Values that cannot be told from zero are zero.

    All bases together span a space of dimension r, whose Ritz vectors are y_a. Let W be the span of the other
    bases, c its dimension, and w the part of this run's start vector outside W. Then W is known, and w is a
    random sample of what is not: the eigenvalue measure tr f(A) = tr_W f(A) + tr_(not W) f(A) is n times

        weight_a = (|W^T y_a|^2 + (n - c) <w, y_a>^2 / |w|^2) / n,

    for a single run the squared first components that quadrature takes. This is the exchange of roles of
    XTrace, for all functions f at once.

    References:
        E. N. Epperly, J. A. Tropp, R. J. Webber, XTrace: making the most of every sample in stochastic trace
        estimation, 2024. What it becomes for densities is derived here.
    """
    n, sizes = runs[0].products.n, [run.size for run in runs]
    ends, rank = np.cumsum(sizes), sum(sizes)
    gram = _gram(runs)
    G, QR, RR = gram[:rank, :rank], gram[:rank, rank:], gram[rank:, rank:]
    last = np.eye(rank)[ends - 1]  # A Q = Q T + R last
    T = block_diag(*[np.diag(run.alphas) + np.diag(run.betas, 1) + np.diag(run.betas, -1) for run in runs])
    # an orthonormal basis Q C of the joint span; what several runs have found is in it once
    noise = max(run.noise / (run.scale or 1.0) for run in runs)
    eps = max(runs[0].products.eps, 2 * noise * max(sizes) ** 0.5)
    cut = max(10 * eps, 1e-8)  # of squared sines; the rounding of G, 1e-16, must stay far below
    g, V = eigh(G)
    kept = g > cut
    C, D = V[:, kept] / np.sqrt(g[kept]), V[:, ~kept]
    H = C.T @ (G @ T + QR @ last) @ C
    nodes, S = eigh((H + H.T) / 2)
    Y = C @ S
    # errors, of A and of G, grow where the vectors that a Ritz vector is made of nearly cancel
    length, top = np.linalg.norm(Y, axis=0), np.abs(nodes).max()
    rounding = np.finfo(float).eps * length**2
    nodes[np.abs(nodes) <= top * (NOISE * noise * length + ROUNDING * rounding)] = 0.0
    least = top * (eps * np.maximum(length, 1) + rounding)
    order = np.argsort(nodes, kind="stable")
    nodes, Y, least = nodes[order], Y[:, order], least[order]
    # what A y has outside of the joint space: of the residuals, and of the directions that were cut off
    ends_of_y, rest = last @ Y, D.T @ T @ Y
    outside = RR - QR.T @ C @ C.T @ QR
    squares = ends_of_y * (outside @ ends_of_y)
    cut_off = rest * (np.maximum(g[~kept], 0)[:, None] * rest + 2 * D.T @ QR @ ends_of_y)
    residuals = np.sqrt(np.maximum(squares.sum(0) + cut_off.sum(0), least**2))
    weights = _leave_one_out(G @ Y, (V / (g + cut)) @ V.T, ends, n)
    return torch.from_numpy(nodes), torch.from_numpy(weights), torch.from_numpy(residuals)


def _leave_one_out(inner: np.ndarray, M: np.ndarray, ends: np.ndarray, n: int) -> np.ndarray:
    """The weights by each run, from inner = Q^T y and M = G^-1."""
    # with u = M Q^T y and the rows i of one run: |W^T y|^2 = y^T Q u - u_i^T M_ii^-1 u_i, and <w, y> is the first
    # entry of M_ii^-1 u_i (block elimination)
    u = M @ inner
    spanned = (inner * u).sum(0)
    weights = []
    for start, end in pairwise([0, *ends]):
        root = cholesky(M[start:end, start:end], lower=True)
        half = solve_triangular(root, u[start:end], lower=True)
        known = np.maximum(spanned - (half**2).sum(0), 0)
        sample = solve_triangular(root, half, lower=True, trans="T")[0] ** 2
        weights.append((known + (n - known.sum()) * sample / sample.sum()) / n)
    return np.stack(weights)


def _gram(runs: list[Lanczos]) -> np.ndarray:
    """Inner products of all basis vectors and, after them, all residuals."""
    parts = [part for run in runs for part in run.parts]
    count, n = sum(map(len, parts)) + len(runs), runs[0].products.n
    gram = runs[0].residual.new_zeros(count, count)
    width = max(1, CHUNK // count)
    for i in range(0, n, width):
        residuals = [run.residual[None, i : i + width] * (not run.invariant) for run in runs]
        some = torch.cat([*(part[:, i : i + width].double() for part in parts), *residuals])
        gram += some @ some.mT
    return gram.cpu().numpy()
