"""Preflight finds what would spoil a long run, names it, and raises no false alarm."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradcond import curvature
from gradcond.curvature import preflight
from gradcond.curvature.memory import available
from gradcond.curvature.preflight import STEPS


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 3)).float()


def samples(rows: int = 24, **options) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(rows, 4, generator=generator, dtype=torch.float32), torch.arange(rows) % 3)
    return DataLoader(data, batch_size=8, **options)


def test_what_it_tells_of_a_known_matrix():
    eigenvalues = torch.linspace(-1.0, 4.0, 50, dtype=torch.float64)
    found = preflight(torch.diag(eigenvalues), num_matvecs=30)
    assert found.noise == 0 and found.asymmetry < 1e-14 and found.cost == STEPS
    assert 2e-15 < found.noise_floor < 8 * torch.finfo(torch.float64).eps * 4.0 * 1.01
    assert found.basis_bytes == 30 * 50 * 8 and 0 < found.seconds < 5
    lines = str(found).splitlines()
    assert "repeatable to 0.0e+00" in lines[0] and lines[1].startswith("30 products of") and "12 kB" in lines[1]


class Random:
    """An operator whose products are noisy, and that cannot tell."""

    shape, dtype, device = (50, 50), torch.float64, torch.device("cpu")

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        return torch.linspace(1, 2, 50) * v + 1e-7 * torch.randn(50)


def test_the_noise_of_any_operator_is_measured():
    found = preflight(Random())
    assert found.cost == 5 and 1e-8 < found.noise < 1e-5


def test_a_basis_is_no_larger_than_the_space():
    assert preflight(torch.eye(4), num_matvecs=100).basis_bytes == 4 * 4 * 8


@pytest.mark.parametrize("kind", [curvature.Hessian, curvature.GGN])
def test_five_products_and_no_false_alarm(kind):
    for seed in range(25):
        model = network(nn.Tanh(), nn.LayerNorm(6), nn.Dropout(0.5)).eval()
        for p in model.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
        found = preflight(kind(model, nn.CrossEntropyLoss(), samples()), seed=seed)
        assert found.cost == 5 and found.noise < 1e-5 and found.asymmetry < 1e-5


class Noisy(torch.utils.data.Dataset):
    """A data set that augments: each sample is drawn anew."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(4, dtype=torch.float32), index % 3


class Shaky(nn.Module):
    """A layer that is random in eval mode, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + torch.rand_like(x))


CULPRITS = {
    "dropout": (lambda: network(nn.Tanh(), nn.Dropout(0.5)), samples(), ["'2'", "Dropout", "eval()"]),
    "batch norm": (lambda: network(nn.BatchNorm1d(6)), samples(shuffle=True), ["'1'", "BatchNorm1d", "shuffle"]),
    "last batch": (lambda: network().eval(), samples(20, shuffle=True, drop_last=True), ["drop_last", "shuffle"]),
    "augmentation": (lambda: network().eval(), DataLoader(Noisy(), batch_size=8), ["augment"]),
    "functional": (lambda: network(Shaky()).eval(), samples(), ["'1'", "Shaky"]),
}


@pytest.mark.parametrize("case", CULPRITS)
def test_what_is_random_is_named(case):
    build, data, words = CULPRITS[case]
    with pytest.raises(ValueError, match="differ by") as error:
        preflight(curvature.Hessian(build(), nn.CrossEntropyLoss(), data))
    for word in words:
        assert word in str(error.value)


def test_asymmetry_is_found():
    class Skewed(curvature.Operator):
        def _columns(self, V):
            return V + 0.1 * V.roll(1, 0)

    with pytest.raises(ValueError, match="symmetric"):
        preflight(Skewed(40, torch.float64, torch.device("cpu")))


def test_a_basis_that_cannot_fit_is_refused_before_the_first_product():
    class Huge(curvature.Operator):
        def _columns(self, V):
            raise AssertionError("a product was made")

    with pytest.raises(MemoryError, match=r"300 vectors of 1000000000000 numbers needs 1200 TB, .* free"):
        preflight(Huge(10**12, torch.float32, torch.device("cpu")), num_matvecs=300)


def test_free_memory_is_known_here_and_plausible():
    free = available(torch.device("cpu"))
    assert free is None or 1e6 < free < 1e15


@pytest.mark.parametrize("count", [0, -1])
def test_bad_counts_are_told(count):
    with pytest.raises(ValueError, match=f"at least 1, got {count}"):
        preflight(torch.eye(3), num_matvecs=count)


def test_products_that_are_not_finite_are_told():
    with pytest.raises(ValueError, match="NaN or infinity"):
        preflight(torch.full((3, 3), math.nan))
