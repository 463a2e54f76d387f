"""How the package holds together: imports point one way, every exported name is documented."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pathlib
import pkgutil

import pytest

import gradcond
import gradcond.curvature

ROOT = pathlib.Path(gradcond.__file__).parent


def imported(path):
    """The modules that a file imports, by absolute name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    for path in ROOT.rglob("*.py"):
        inside = path.is_relative_to(ROOT / "curvature")
        for name in imported(path):
            assert not name.startswith(("analysis", "examples", "tests", "sklearn")), f"{path} imports {name}"
            if inside and name.startswith("gradcond"):
                assert name.startswith(("gradcond.curvature", "gradcond._version")), f"{path} imports {name}"
            if not inside:
                assert not name.startswith("gradcond.curvature"), f"{path} imports {name}"


def is_result(thing):
    """A frozen dataclass: what a function returns."""
    return dataclasses.is_dataclass(thing) and thing.__dataclass_params__.frozen


@pytest.mark.parametrize("package", [gradcond, gradcond.curvature])
def test_every_export_is_documented_with_an_example(package):
    assert len(package.__all__) == len(set(package.__all__))
    finder = doctest.DocTestFinder(exclude_empty=True, recurse=False)
    for name in package.__all__:
        thing = getattr(package, name)
        if name.startswith("__"):
            continue
        assert inspect.getdoc(thing), f"{name} has no docstring"
        if name in ("Attachment", "ConditionedOptimizer", "Preconditioner") or is_result(thing):
            continue  # made by functions, which have the example
        assert any(test.examples for test in finder.find(thing, name)), f"{name} has no doctest"


@pytest.mark.parametrize("name", ["GGN", "EmpiricalFisher", "MonteCarloFisher"])
def test_every_matrix_of_a_loss_shows_the_arguments_of_the_hessian(name):
    def arguments(kind):
        return inspect.signature(kind).parameters

    own = {"mc_samples", "seed"} if name == "MonteCarloFisher" else set()
    found, expected = arguments(getattr(gradcond.curvature, name)), arguments(gradcond.curvature.Hessian)
    assert found.keys() - own == expected.keys()
    for argument, parameter in expected.items():
        assert found[argument] == parameter


def test_every_module_has_a_docstring_and_no_module_is_left_out():
    for info in pkgutil.walk_packages([str(ROOT)], "gradcond."):
        assert importlib.import_module(info.name).__doc__, f"{info.name} has no docstring"
