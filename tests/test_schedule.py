"""Hyper-parameters that follow the step: values, effect, save and load, and what is refused."""

import io

import pytest
import torch
from test_optimizer import network, train

from gradcond import BNP, ConditionerScheduler, MeanShiftRejection, wrap


def scheduled(model, lr=0.1):
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=lr), model, [BNP()])
    bnp = optimizer.conditioners[0]
    return optimizer, ConditionerScheduler(bnp, eps_rel=lambda t: 0.5**t, decay=lambda t: min(0.9, 0.2 * t))


def test_values_follow_the_step_and_change_what_is_trained():
    model, plain, by_hand = network(), network(), network()
    optimizer, schedule = scheduled(model)
    reference = wrap(torch.optim.SGD(by_hand.parameters(), lr=0.1), by_hand, [BNP(eps_rel=1.0, decay=0.0)])
    for step in range(4):
        assert optimizer.conditioners[0].eps_rel == 0.5**step
        result = train(model, optimizer, 1, first=step)
        schedule.step()
        expected = train(by_hand, reference, 1, first=step)
        reference.conditioners[0].eps_rel, reference.conditioners[0].decay = 0.5 ** (step + 1), 0.2 * (step + 1)
    assert torch.equal(result, expected)
    unscheduled = train(plain, wrap(torch.optim.SGD(plain.parameters(), lr=0.1), plain, [BNP()]), 4)
    assert not torch.allclose(result, unscheduled)


def test_resumed_is_uninterrupted():
    model, twin = network(), network(seed=3)
    optimizer, schedule = scheduled(model)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        schedule.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), schedule.state_dict()), file)
    file.seek(0)
    weights, state, position = torch.load(file, weights_only=True)
    again, resumed = scheduled(twin)
    twin.load_state_dict(weights)
    again.load_state_dict(state)
    resumed.load_state_dict(position)
    for step in range(3, 6):
        a, b = train(model, optimizer, 1, first=step), train(twin, again, 1, first=step)
        schedule.step()
        resumed.step()
        assert torch.equal(a, b)
        assert again.conditioners[0] == optimizer.conditioners[0]


def test_what_is_out_of_range_is_refused_and_changes_nothing():
    msr = MeanShiftRejection()
    schedule = ConditionerScheduler(msr, rejection=lambda t: 0.6 * t)
    schedule.step()
    with pytest.raises(ValueError, match=r"rejection must be in \[0, 1\], got 1.2"):
        schedule.step()
    assert msr.rejection == 0.6
    with pytest.raises(ValueError, match=r"expected what state_dict\(\) returned, got the keys \['step'\]"):
        schedule.load_state_dict({"step": 1})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: (BNP, {}), TypeError, "expected a conditioner"),
        (lambda: (BNP(), {"lr": lambda t: t}), ValueError, "BNP has no hyper-parameter 'lr'; it has .*'decay'"),
        (lambda: (BNP(), {"decay": 0.5}), TypeError, "decay must be a function of the step, got 0.5"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    conditioner, functions = arguments()
    with pytest.raises(error, match=message):
        ConditionerScheduler(conditioner, **functions)
