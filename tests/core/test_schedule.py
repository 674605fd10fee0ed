"""NoiseSchedule against known numbers, its own identities and diffusers' tables."""

import pytest
import torch
from diffusers import DDIMScheduler

from lcm.core.schedule import BETA_SCHEDULES, NoiseSchedule
from lcm.errors import UserError

ALL = torch.arange(1000)
EVERY_SCHEDULE = [(kind, zero_snr) for kind in BETA_SCHEDULES for zero_snr in (False, True)]
every_schedule = pytest.mark.parametrize(("kind", "zero_snr"), EVERY_SCHEDULE)


def make(kind, zero_snr):
    return NoiseSchedule(beta_schedule=kind, rescale_betas_zero_snr=zero_snr)


@pytest.mark.parametrize(
    ("t", "alpha_bar", "alpha", "sigma"),
    [
        (0, 0.99915, 0.999574910, 0.029154759),
        (19, 0.982243991, 0.991082232, 0.133251675),
        (39, 0.962895068, 0.981272168, 0.192626405),
        (259, 0.658975527, 0.811773076, 0.583973007),
        (499, 0.277669650, 0.526943688, 0.849900200),
        (759, 0.052212928, 0.228501484, 0.973543564),
        (979, 0.005912770, 0.076894540, 0.997039228),
        (999, 0.004660099, 0.068264914, 0.997667230),
    ],
)
def test_golden_stable_diffusion(t, alpha_bar, alpha, sigma):
    schedule = NoiseSchedule()
    assert schedule.alpha[t].item() ** 2 == pytest.approx(alpha_bar, abs=1e-7)
    assert schedule.alpha[t].item() == pytest.approx(alpha, abs=1e-7)
    assert schedule.sigma[t].item() == pytest.approx(sigma, abs=1e-7)


@pytest.mark.parametrize(("t", "alpha_bar"), [(0, 0.99915), (19, 0.981010457), (499, 0.242359167), (979, 8.57878e-5), (999, 0)])
def test_golden_zero_terminal_snr(t, alpha_bar):
    assert make("scaled_linear", True).alpha[t].item() ** 2 == pytest.approx(alpha_bar, abs=1e-7)


@every_schedule
def test_variance_preserving(kind, zero_snr):
    schedule = make(kind, zero_snr).double()
    assert (schedule.alpha**2 + schedule.sigma**2 - 1).abs().max() < 1e-6


@every_schedule
def test_agrees_with_diffusers(kind, zero_snr):
    schedule = make(kind, zero_snr)
    theirs = DDIMScheduler.from_config(schedule.config).alphas_cumprod
    torch.testing.assert_close(schedule.alpha**2, theirs, rtol=1e-4, atol=1e-7)


@every_schedule
def test_half_log_snr_falls_and_is_finite(kind, zero_snr):
    log_snr = make(kind, zero_snr).half_log_snr(ALL)
    assert log_snr.isfinite().all()
    assert (log_snr.diff() < 0).all()


def test_half_log_snr_is_log_alpha_over_sigma():
    schedule = NoiseSchedule()
    torch.testing.assert_close(schedule.half_log_snr(ALL).exp(), schedule.alpha / schedule.sigma)


def test_config_survives_diffusers():
    schedule = NoiseSchedule(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        num_train_timesteps=500,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    )
    theirs = dict(DDIMScheduler(**schedule.config).config)
    assert set(theirs) > set(schedule.config)  # clip_sample, _class_name, ...: to be ignored
    again = NoiseSchedule.from_config(theirs)
    assert again.config == schedule.config
    assert torch.equal(again.alpha, schedule.alpha)


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_from_config_fills_in_defaults():
    assert NoiseSchedule.from_config({"clip_sample": True, "trained_betas": None, **BETAS}).config == NoiseSchedule().config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}, "EDMDPMSolverMultistepScheduler has no betas"),
        ({**BETAS, "_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler has no betas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler has no betas"),
        ({**BETAS, "trained_betas": [0.1] * 1000}, "trained_betas are not read"),
        ({"_class_name": "DDIMScheduler"}, "does not say beta_schedule, beta_start, beta_end: write"),
        ({**BETAS, "beta_end": None}, "does not say beta_end: write"),
    ],
)
def test_noise_of_another_kind_and_betas_left_to_a_default_are_refused(config, says):
    with pytest.raises(UserError, match=says):
        NoiseSchedule.from_config(config)


def test_number_of_timesteps():
    schedule = NoiseSchedule(num_train_timesteps=100)
    assert schedule.num_timesteps == len(schedule.alpha) == len(schedule.sigma) == 100


@pytest.mark.parametrize("key", ["beta_schedule", "prediction_type"])
def test_unknown_name_is_a_user_error(key):
    with pytest.raises(UserError, match=f"unknown {key} 'nonsense'"):
        NoiseSchedule(**{key: "nonsense"})


def test_tables_stay_out_of_checkpoints():
    assert not NoiseSchedule().state_dict()


def test_add_noise_uses_each_samples_own_t():
    schedule, t = NoiseSchedule(), torch.tensor([0, 499, 999])
    z0, eps = torch.full((3, 4, 2, 2), 0.5), torch.full((3, 4, 2, 2), -1.2)
    expected = 0.5 * schedule.alpha[t] - 1.2 * schedule.sigma[t]
    torch.testing.assert_close(schedule.add_noise(z0, eps, t), expected.view(3, 1, 1, 1).expand_as(z0))
