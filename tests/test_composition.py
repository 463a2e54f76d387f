"""Why conditioners are nested, not applied one after the other, and what they leave to the initialization."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from gradcond import BNP, MeanShiftRejection, unit_variance_init_, wrap


def matrices(x):
    """BNP's M and that of mean-shift rejection on a convolution of these inputs, and M of the two nested."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    found = []
    for chain in ([BNP()], [MeanShiftRejection()], [BNP(), MeanShiftRejection()]):
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.0), model, chain)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        found.append(optimizer.preconditioner().apply(torch.eye(20)))
    return found


def test_one_after_the_other_is_no_metric_and_may_ascend():
    bnp, msr, nested = matrices(4.0 + torch.randn(4, 1, 8, 8))
    sequence = msr @ bnp
    assert not torch.allclose(sequence, sequence.mT)
    # some gradient g has a step M_msr M_bnp g that goes up: <g, M_msr M_bnp g> < 0
    assert torch.linalg.eigvalsh((sequence + sequence.mT) / 2).min() < -0.1
    assert torch.linalg.eigvalsh(nested).min() > 0


def final_loss(chain, seed, in_sequence=False):
    """The mean loss of the last 40 of 250 steps on digits, whose pixels have a mean far from zero."""
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16)[:, None] + 4.0, torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = nn.Sequential(
        *[nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()],
        *[nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)],
    )
    sgd = torch.optim.SGD(model.parameters(), lr=1 / 24)
    optimizer = wrap(sgd, model, chain)

    def reject(*_):
        """Applies M_msr to what the chain has made of the gradient."""
        for module in model:
            if isinstance(module, nn.Conv2d):
                module.weight.grad -= 0.9 * module.weight.grad.mean((2, 3), keepdim=True)

    if in_sequence:
        sgd.register_step_pre_hook(reject)
    losses = []
    for _ in range(250):
        drawn = torch.randint(len(x), (16,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[drawn]), y[drawn])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-40:]) / 40


@pytest.mark.parametrize("seed", [0, 1])
def test_nested_variables_train_where_the_two_in_sequence_do_not(seed):
    """From 2.3 on; measured over 5 seeds: 0.33 to 0.52 nested, 1.45 to 2.32 in sequence."""
    assert final_loss([BNP(), MeanShiftRejection()], seed) < 0.8
    assert final_loss([BNP()], seed, in_sequence=True) > 1.2


def test_the_report_names_layers_whose_inputs_have_died_out_and_initialization_mends_them():
    def notes():
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.0), model, [BNP()])
        model(x).square().sum().backward()
        optimizer.step()
        texts = {name: text for name, [text] in optimizer.report().conditioned.items()}
        variances = {name: optimizer._engine.states[0][name]["variance"] for name in texts}
        for name, text in texts.items():
            low = int((variances[name] < 1e-4).sum())
            assert (f"{low} of 16 input variances under eps" in text) == (low > 0)
            assert ("under eps" in text) == (low > 0)
        return {name for name, text in texts.items() if "under eps" in text}

    model = nn.Sequential(*(module for _ in range(14) for module in (nn.Linear(16, 16), nn.Tanh())))
    x, inputs = torch.randn(64, 16), {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, o, name=name: inputs.update({name: a[0].detach()}))
    model(x)
    died_out = {
        n
        for n, m in model.named_children()
        if isinstance(m, nn.Linear) and inputs[n].var(0, correction=0).min() < 1e-4
    }
    assert notes() == died_out
    assert {"24", "26"} <= died_out and "0" not in died_out
    unit_variance_init_(model, x)
    assert notes() == set()
