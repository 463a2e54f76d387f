"""The cost of a step: its networks differ by their normalization layers alone, its numbers are what they say."""

import json
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("key", ["a", "b128", "b6", "b1", "c", "d"])
def test_normalization_layers_are_all_that_differs(key):
    from step_models import CASES

    case = CASES[key]
    with torch.device("meta"):
        plain = [p.shape for p in case.build(nn.Identity, True).parameters()]
        for norm in case.norms.values():
            model = case.build(norm, True)
            layers = [
                m
                for m in model.modules()
                if isinstance(m, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
            ]
            added = [p.shape for m in layers for p in m.parameters()]
            assert added and sorted([p.shape for p in model.parameters()]) == sorted(plain + added)
        inputs, targets = case.data(torch.device("meta"))
        assert model(inputs).shape == (len(targets), case.classes)


def test_both_kinds_of_attention_take_the_same_numbers():
    from step_models import transformer

    torch.manual_seed(0)
    one, other = transformer(nn.LayerNorm, True), transformer(nn.LayerNorm, True, "mha")
    for a, b in zip(one[1:5], other[1:5], strict=True):
        projections = (a.attention.query, a.attention.key, a.attention.value)
        attention = b.attention.attention
        attention.in_proj_weight.data = torch.cat([p.weight for p in projections])
        attention.in_proj_bias.data = torch.cat([p.bias for p in projections])
        attention.out_proj.load_state_dict(a.attention.out.state_dict())
        b.norms, b.feed_forward = a.norms, a.feed_forward
    other[0], other[5], other[6] = one[0], one[5], one[6]
    tokens = torch.randint(256, (2, 5))
    torch.testing.assert_close(other(tokens), one(tokens))


@pytest.mark.parametrize("key", ["b128", "b6", "b1"])
def test_what_is_done_by_hand_is_what_bnp_does(key):
    import step_cost
    from step_models import CASES

    case, args = CASES[key], step_cost.parse([])
    inputs, targets = case.data(args.device)
    found = []
    for variant in ("BNP", step_cost.BY_HAND):
        model, optimizer = step_cost.build(case, variant, args)
        for group in getattr(optimizer, "optimizer", optimizer).param_groups:
            group["lr"] = 0.1
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        for step in range(4):
            nn.functional.cross_entropy(model(inputs + step / 10), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    assert (found[0] - found[1]).norm() < 1e-4 * found[0].norm()


def test_ratios_are_those_of_the_medians_of_differences():
    from step_timing import compare

    drift = np.linspace(1.0, 9.0, 31)  # a slower and slower machine
    found = compare({"plain": drift, "BatchNorm": drift + 0.4, "BNP": drift + 0.1}, "BatchNorm")
    assert found["BNP"]["added_ms"] == pytest.approx(0.1)
    assert found["BNP"]["ratio"] == pytest.approx(0.25)
    assert found["BNP"]["ratio_interval"] == pytest.approx((0.25, 0.25))
    assert found["plain"]["ms"] == 5.0


def test_peak_memory_counts_what_is_alive_at_once():
    import step_cost

    args = step_cost.parse([])
    case = step_cost.CASES["b128"]
    parameters = 4 * (785 * 100 + 2 * 101 * 100 + 101 * 10)
    peak = step_cost.peak_bytes(case, "plain", args)
    assert peak == step_cost.peak_bytes(case, "plain", args)
    assert 2 * parameters + 4 * 128 * 784 < peak < 2 * parameters + 4 * 128 * (784 + 900)


def test_the_command_writes_its_tables(tmp_path, capsys):
    import step_cost

    threads = torch.get_num_threads()
    assert step_cost.main(["--rounds", "3", "--warm-up", "1", "--variants", "BNP", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    assert (tmp_path / "step_cost.md").read_text() == text
    found = json.loads((tmp_path / "step_cost.json").read_text())
    rows = found["cases"]["b6"]["variants"]
    assert found["format"] == 1
    assert list(rows) == ["plain", "BatchNorm", "BNP"]
    assert rows["BatchNorm"]["ratio"] == 1
    assert "| BNP |" in text and "GradientCentralization alone, 4 gradients" in text


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--variants", "nothing"], ["--case", "z"], ["--device", "z"]]
)
def test_the_command_refuses(arguments, capsys):
    import step_cost

    with pytest.raises(SystemExit):
        step_cost.main(arguments)
    assert arguments[1] in capsys.readouterr().err
