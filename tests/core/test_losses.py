"""Every distance of conf/model/loss, new ones included."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lcm.core import losses

YAMLS = sorted((Path(__file__).parents[2] / "conf/model/loss").glob("*.yaml"))
LOSSES = {path.stem: instantiate(OmegaConf.load(path)) for path in YAMLS}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
X, Y = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
assert "l2" in LOSSES


@every_loss
def test_is_a_distance(loss):
    difference = torch.tensor([1e-4, 1e-2, 1.0, 100.0])
    assert loss(X, Y).shape == X.shape
    assert (loss(X, X) == 0).all()
    assert (loss(difference, torch.zeros(4)) > 0).all()
    assert (loss(X, Y) > 0).all()
    assert torch.equal(loss(X, Y), loss(Y, X))


@every_loss
def test_gradient(loss):
    """The gradient is 0 where x = y, and points away from y elsewhere."""
    x = X.clone().requires_grad_()
    [at_zero] = torch.autograd.grad(loss(x, X).sum(), x)
    [elsewhere] = torch.autograd.grad(loss(x, Y).sum(), x)
    assert (at_zero == 0).all()
    assert torch.equal(elsewhere.sign(), (X - Y).sign())


def test_golden_pseudo_huber():
    loss = losses.huber(torch.tensor([0.0, 1e-3, 1e-2, 1.0]), torch.zeros(4), c=1e-3)
    assert loss.tolist() == pytest.approx([0, 4.14214e-4, 9.04988e-3, 0.9990005], rel=1e-5)


def test_golden_cauchy():
    assert losses.cauchy(torch.tensor(0.2), torch.tensor(0.0), c=0.1).item() == pytest.approx(1.0986123)  # log 3


def test_huber_is_quadratic_below_c_and_absolute_above():
    x, zero = torch.tensor([0.01]), torch.zeros(1)
    torch.testing.assert_close(losses.huber(x, zero, c=1.0), losses.l2(x, zero) / 2, rtol=1e-2, atol=0)
    torch.testing.assert_close(losses.huber(x, zero, c=1e-6), losses.l1(x, zero), rtol=1e-3, atol=0)


def test_c_of_cauchy_matters():
    assert not torch.allclose(losses.cauchy(X, Y, c=0.01), losses.cauchy(X, Y, c=0.5))
