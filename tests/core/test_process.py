"""VP and Flow against golden values, identities and diffusers' tables."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from lcm.core.errors import UserError
from lcm.core.process import BETA_SCHEDULES, VP, Flow, process_of

ALL = torch.arange(1000)
EVERY_SCHEDULE = [(kind, zero_snr) for kind in BETA_SCHEDULES for zero_snr in (False, True)]
PROCESSES = [VP(), VP(beta_schedule="squaredcos_cap_v2"), VP(rescale_betas_zero_snr=True), Flow(shift=3.0)]
THREE = [VP(), VP(rescale_betas_zero_snr=True), Flow(shift=3.0)]
three_processes = pytest.mark.parametrize("process", THREE, ids=["vp", "zero_snr", "flow_3"])


def make(kind, zero_snr):
    return VP(beta_schedule=kind, rescale_betas_zero_snr=zero_snr)


def test_golden_stable_diffusion():
    golden = [  # t, alpha_bar, alpha, sigma
        (0, 0.99915, 0.999574910, 0.029154759),
        (19, 0.982243991, 0.991082232, 0.133251675),
        (39, 0.962895068, 0.981272168, 0.192626405),
        (259, 0.658975527, 0.811773076, 0.583973007),
        (499, 0.277669650, 0.526943688, 0.849900200),
        (759, 0.052212928, 0.228501484, 0.973543564),
        (979, 0.005912770, 0.076894540, 0.997039228),
        (999, 0.004660099, 0.068264914, 0.997667230),
    ]
    process = VP()
    for t, alpha_bar, alpha, sigma in golden:
        t = torch.tensor([t])
        assert process.alpha(t).item() ** 2 == pytest.approx(alpha_bar, abs=1e-7)
        assert process.alpha(t).item() == pytest.approx(alpha, abs=1e-7)
        assert process.sigma(t).item() == pytest.approx(sigma, abs=1e-7)


def test_golden_zero_terminal_snr():
    t, golden = torch.tensor([0, 19, 499, 979, 999]), [0.99915, 0.981010457, 0.242359167, 8.57878e-5, 0]
    assert [alpha**2 for alpha in make("scaled_linear", True).alpha(t).tolist()] == pytest.approx(golden, abs=1e-7)


@pytest.mark.parametrize(("kind", "zero_snr"), [*((kind, False) for kind in BETA_SCHEDULES), ("scaled_linear", True)])
def test_vp_agrees_with_diffusers(kind, zero_snr):
    process = make(kind, zero_snr)
    theirs = DDIMScheduler.from_config(process.config).alphas_cumprod
    torch.testing.assert_close(process.alpha(ALL) ** 2, theirs, rtol=1e-4, atol=1e-7)
    assert (process.double().alpha(ALL) ** 2 + process.sigma(ALL) ** 2 - 1).abs().max() < 1e-6


@pytest.mark.parametrize(("shift", "steps"), [(0.5, 1000), (1.15, 100), (3.0, 1000)])
def test_flow_agrees_with_diffusers(shift, steps):
    flow, scheduler = Flow(shift=shift, num_train_timesteps=steps), FlowMatchEulerDiscreteScheduler(steps, shift)
    t = torch.arange(steps)
    torch.testing.assert_close(flow.sigma(t).flip(0), scheduler.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(flow.alpha(t), 1 - flow.sigma(t))
    if steps == 1000:
        torch.testing.assert_close(flow.network_time(t).flip(0), scheduler.timesteps, rtol=1e-6, atol=0)


def test_golden_flow_of_few_steps():
    """The noise levels of four trailing steps of SD3 (shift 3)."""
    t = torch.tensor([999, 749, 499, 249, -1])
    torch.testing.assert_close(Flow(shift=3.0).sigma(t), torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def test_ends_of_flow():
    flow = Flow(shift=3.0)
    assert flow.t_min == -1
    ends = torch.tensor([flow.t_min, 999])
    assert flow.sigma(ends).tolist() == [0, 1]
    assert flow.alpha(ends).tolist() == [1, 0]


def test_flow_rejects_shift():
    with pytest.raises(UserError, match=r"shift=0\.0"):
        Flow(shift=0.0)


def test_half_log_snr_is_finite_and_decreases():
    for process in (*(make(*schedule) for schedule in EVERY_SCHEDULE), Flow(), Flow(shift=3.0)):
        log_snr = process.half_log_snr(torch.arange(process.t_min, 1000))
        assert log_snr.isfinite().all()
        assert (log_snr.diff() < 0).all()


def test_snr_is_squared_alpha_over_sigma():
    t = ALL[:-1]  # a flow's alpha ends at 0
    for process in PROCESSES:
        torch.testing.assert_close(process.snr(t), (process.alpha(t) / process.sigma(t)) ** 2, rtol=1e-5, atol=0)


@three_processes
def test_timestep_at_inverts_half_log_snr(process):
    """The values match at the timesteps and between them. Interpolation in lambda would be off by 0.05 near the clean end."""
    for t in (ALL[:-1], torch.linspace(0, 998, 4001)):
        torch.testing.assert_close(process.timestep_at(process.half_log_snr(t)), t.float(), rtol=0, atol=0.02)
    t = torch.linspace(0.05, 300, 4001)
    torch.testing.assert_close(process.timestep_at(process.half_log_snr(t)), t, rtol=0, atol=5e-4)


@pytest.mark.parametrize(("half_log_snr", "t"), [(9.0, 0), (-9.0, 999)])
def test_timestep_at_clamps_in_vp(half_log_snr, t):
    assert VP().timestep_at(torch.tensor([half_log_snr])).item() == t


@three_processes
def test_alpha_and_sigma_in_float_time(process):
    """The values are exact at integers. The derivative is a finite difference within one interval of the tables."""
    for scale in (process.alpha, process.sigma):
        assert torch.equal(scale(ALL.float()), scale(ALL))
    t = (torch.tensor([0, 1, 19, 259, 499, 759, 998]) + 0.5).requires_grad_()
    for scale in (process.alpha, process.sigma):
        [slope] = torch.autograd.grad(scale(t).sum(), t)
        with torch.no_grad():
            difference = (scale(t + 0.5).double() - scale(t - 0.5).double()).float()
        assert (slope != 0).all()
        torch.testing.assert_close(slope, difference, rtol=5e-3, atol=2e-7)


def test_vp_is_linear_between_timesteps():
    process = VP()
    for scale in (process.alpha, process.sigma):
        low, high = scale(torch.tensor([19])), scale(torch.tensor([20]))
        torch.testing.assert_close(scale(torch.tensor([19.25])), 0.75 * low + 0.25 * high, rtol=1e-6, atol=0)


def test_vp_config_survives_diffusers():
    process = VP(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=500, rescale_betas_zero_snr=True)
    theirs = dict(DDIMScheduler(**process.config, prediction_type="v_prediction").config)
    assert set(theirs) > set(process.config)  # clip_sample, _class_name, ...: to be ignored
    again = process_of(theirs)
    assert again.config == process.config
    assert torch.equal(again.alphas, process.alphas)
    assert again.num_timesteps == len(again.alphas) == len(again.sigmas) == 500


def test_flow_config_survives_diffusers():
    theirs = dict(FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=3.0).config)
    again = process_of({**theirs, "_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert isinstance(again, Flow)
    assert again.config == Flow(shift=3.0, num_train_timesteps=500).config


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_process_of_uses_defaults():
    assert process_of({"clip_sample": True, "trained_betas": None, **BETAS}).config == VP().config
    assert process_of({"_class_name": "FlowMatchEulerDiscreteScheduler"}).config == Flow().config


def test_flow_matching_schedulers_are_flows():
    for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"):
        process = process_of({**BETAS, "_class_name": name, "shift": 3.0, "use_dynamic_shifting": False})
        assert isinstance(process, Flow)
        assert process.config == {"shift": 3.0, "num_train_timesteps": 1000}


def test_dpm_solver_with_flow_sigmas_is_flow():
    """Sana's scheduler, whose betas have no effect."""
    config = dict(DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction").config)
    assert process_of({**config, "_class_name": "DPMSolverMultistepScheduler"}).config == Flow(shift=3.0).config
    assert process_of({**config, **BETAS, "use_flow_sigmas": False}).config == VP().config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5},
            "EDMDPMSolverMultistepScheduler is not supported",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "FlowMatchEulerDiscreteScheduler shifts its timesteps by the image size",
        ),
        ({**BETAS, "trained_betas": [0.1] * 1000}, "trained_betas are not supported"),
        ({"_class_name": "DDIMScheduler"}, "lacks beta_schedule, beta_start, beta_end: add"),
    ],
)
def test_process_of_rejects(config, says):
    with pytest.raises(UserError, match=says):
        process_of(config)


def test_vp_rejects_unknown_schedule():
    with pytest.raises(UserError, match="unknown beta_schedule 'nonsense'"):
        VP(beta_schedule="nonsense")


def test_tables_are_not_in_checkpoints():
    assert not VP().state_dict()


@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
def test_jump_uses_t_of_each_sample(process):
    t = torch.tensor([0, 499, 999])
    z0, eps = torch.full((3, 4, 2, 2), 0.5), torch.full((3, 4, 2, 2), -1.2)
    expected = 0.5 * process.alpha(t) - 1.2 * process.sigma(t)
    torch.testing.assert_close(process.jump(z0, eps, t), expected.view(3, 1, 1, 1).expand_as(z0))
