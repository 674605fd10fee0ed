"""eps, v and x0: three readings of one z_t."""

import pytest
import torch

from lcm.core import prediction
from lcm.core.prediction import PREDICTION_TYPES
from lcm.core.schedule import NoiseSchedule
from lcm.errors import UserError

every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
T = torch.tensor([0, 1, 259, 499, 979, 999])
X0, EPS = torch.randn(2, len(T), 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["scaled_linear", "squaredcos_cap_v2"])
@every_type
def test_denoised_inverts_target(kind, prediction_type):
    schedule = NoiseSchedule(beta_schedule=kind, prediction_type=prediction_type)
    x0, eps = schedule.denoised(schedule.target(X0, EPS, T), schedule.add_noise(X0, EPS, T), T)
    torch.testing.assert_close(x0, X0, rtol=0, atol=1e-2)
    torch.testing.assert_close(eps, EPS, rtol=0, atol=1e-4)


@every_type
def test_target_inverts_denoised(prediction_type):
    """Any output, right or wrong, is what a network that predicts its (x0, eps) would give."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    output, z_t = X0, EPS
    x0, eps = schedule.denoised(output, z_t, T)
    torch.testing.assert_close(schedule.target(x0, eps, T), output, rtol=0, atol=1e-4)


@every_type
def test_denoised_makes_up_z_t(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    output, z_t = X0, EPS
    torch.testing.assert_close(schedule.add_noise(*schedule.denoised(output, z_t, T), T), z_t, rtol=0, atol=1e-4)


def test_x0_and_eps_determine_each_other():
    schedule = NoiseSchedule()
    tables = schedule.at(T, 4)
    z_t = schedule.add_noise(X0, EPS, T)
    torch.testing.assert_close(prediction.eps_of_x0(X0, z_t, *tables), EPS, rtol=0, atol=1e-4)
    torch.testing.assert_close(prediction.x0_of_eps(EPS, z_t, *tables), X0, rtol=0, atol=1e-4)


def test_golden_v():
    schedule = NoiseSchedule(prediction_type="v_prediction")
    x0, eps, t = torch.full((1, 1), 0.5), torch.full((1, 1), -1.2), torch.tensor([499])
    v = schedule.target(x0, eps, t)
    assert v.item() == pytest.approx(-1.057282526, abs=1e-6)
    denoised = schedule.denoised(v, schedule.add_noise(x0, eps, t), t)
    assert (denoised.x0.item(), denoised.eps.item()) == pytest.approx((0.5, -1.2), abs=1e-6)


@every_type
def test_pure_noise_stays_finite(prediction_type):
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    x0, eps = schedule.denoised(X0[:1], EPS[:1], torch.tensor([999]))
    assert x0.isfinite().all()
    assert eps.isfinite().all()


def test_check_names_the_choices():
    with pytest.raises(UserError, match="epsilon, v_prediction, sample"):
        prediction.check("eps")
