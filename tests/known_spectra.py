"""Matrices of prescribed spectrum: what tests of estimators compare with."""

import torch

from gradcond.curvature import Operator


def matrix(eigenvalues, seed=0):
    """A dense symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator))[0]
    A = (Q * eigenvalues) @ Q.mT
    return (A + A.mT) / 2


class Hidden(Operator):
    """A matrix that shows its products alone."""

    def __init__(self, A):
        super().__init__(len(A), A.dtype, A.device)
        self.A = A

    def _columns(self, V):
        return self.A.to(V.dtype) @ V
