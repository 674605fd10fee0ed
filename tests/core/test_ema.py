"""Exponential moving averages of parameters."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcm.core.ema import ema_update_


def tensors(seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=rng), torch.randn(5, generator=rng)]


def test_closed_form_after_n_updates():
    """With constant online weights, the average is online + decay^n (start - online)."""
    average, start, online = tensors(0), tensors(0), tensors(1)
    for _ in range(10):
        ema_update_(average, online, 0.5)
    for a, s, o in zip(average, start, online, strict=True):
        torch.testing.assert_close(a, o + 0.5**10 * (s - o))


@pytest.mark.parametrize(("decay", "seed"), [(0.0, 1), (1.0, 0)])
def test_decay_zero_copies_and_one_keeps(decay, seed):
    average = tensors(0)
    ema_update_(average, tensors(1), decay)
    assert all(torch.equal(a, expected) for a, expected in zip(average, tensors(seed), strict=True))


def test_parameters_are_averaged_in_place():
    average, online = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    weight = average.weight
    before = online.weight.detach().clone()
    ema_update_(average.parameters(), online.parameters(), 0.0)
    assert average.weight is weight
    assert weight.is_leaf
    assert torch.equal(weight, online.weight)
    assert torch.equal(online.weight, before)


@pytest.mark.parametrize("decay", [0.0, 0.999943])
def test_skip_on_device(decay):
    plain, updated, skipped, online = tensors(0), tensors(0), tensors(0), tensors(1)
    ema_update_(plain, online, decay)
    ema_update_(updated, online, decay, torch.tensor(0.0))
    ema_update_(skipped, online, decay, torch.tensor(1.0))
    for p, m, k, start, o, before in zip(plain, updated, skipped, tensors(0), online, tensors(1), strict=True):
        torch.testing.assert_close(m, p, rtol=0, atol=0 if decay > 0.5 else 1e-6)
        assert torch.equal(k, start)
        assert torch.equal(o, before)


def test_skip_on_device_is_one_call():
    """A loop over parameters would start one kernel per parameter."""

    class Calls(TorchDispatchMode):
        names = []  # noqa: RUF012

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **kwargs or {})

    average, online, skip = tensors(0), tensors(1), torch.tensor(0.0)
    with Calls() as calls:
        ema_update_(average, online, 0.9, skip)
    assert calls.names == ["aten._fused_sgd_.default"]
