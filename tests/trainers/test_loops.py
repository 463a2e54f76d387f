"""The plain loop and the comparison say something: conditioning, accumulation and clipping each show."""

import pytest
import torch
from loops import assert_same, plain


@pytest.mark.parametrize("options", [{"chain": "none"}, {"accumulate": 2}, {"clip": 0.1}, {"epochs": 1}])
def test_the_comparison_tells_these_apart(options):
    with pytest.raises(AssertionError):
        assert_same(plain(**{"chain": "bnp", **options}), plain("bnp"))


@pytest.mark.parametrize("what", ["parameters", "momentum", "rate", "statistics"])
def test_the_comparison_sees_each_part(what):
    model, optimizer = plain("bnp")
    state = optimizer.state_dict()
    change = {
        "parameters": lambda: model[-1].bias.data.add_(1e-3),
        "momentum": lambda: state["state"][0]["momentum_buffer"].add_(1e-3),
        "rate": lambda: optimizer.param_groups[0].update(lr=1.0),
        "statistics": lambda: optimizer._engine.states[0]["0"]["mean"].add_(1e-3),
    }[what]
    assert_same((model, optimizer), plain("bnp"))
    with torch.no_grad():
        change()
    with pytest.raises(AssertionError):
        assert_same((model, optimizer), plain("bnp"))
