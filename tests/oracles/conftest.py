"""The peers of the curvature engine; their adapters are those that analysis/curvature_cost.py times."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "analysis"))

import curvature_peers

for module in curvature_peers.MODULES.values():
    curvature_peers.load(module)  # a missing one is an error, not a skip: CONTRIBUTING.md has the command


def pytest_collection_modifyitems(items):
    # torch scripts its own forward-mode formulas at their first use, and warns of it
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning"))
