"""Samplers against diffusers' schedulers and, with every yaml of conf/solver, against Gaussian data's closed forms."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lcm.core import sampling
from lcm.core.networks import conditioned
from lcm.core.prediction import PREDICTION_TYPES
from lcm.core.schedule import NoiseSchedule
from lcm.core.timesteps import consistency_steps, trailing_steps
from tests.core.gaussian import Gaussian

CONF = Path(__file__).parents[2] / "conf"
SAMPLERS = {path.stem: instantiate(OmegaConf.load(path)) for path in sorted((CONF / "solver").glob("*.yaml"))}
ODES = {name: sampler for name, sampler in SAMPLERS.items() if name not in ("lcm", "ddpm")}
for path in sorted((CONF / "model/solver").glob("*.yaml")):
    ODES[f"model/{path.stem}"] = partial(sampling.ode, solver=instantiate(OmegaConf.load(path)))

every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
Z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def net(z, t, cond, w):
    return torch.tanh(z + t.view(-1, *(1,) * (z.ndim - 1)) / 1000)


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


def draws(seed, like=Z):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator)


def ours(sampler, timesteps, noise=no_noise, prediction_type="epsilon"):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    return sampler(conditioned(net, None, schedule), Z, timesteps, schedule=schedule, noise=noise)


def theirs(scheduler, **step):
    z = Z
    for t in scheduler.timesteps:
        z = scheduler.step(net(z, t, None, None), t, z, **step).prev_sample
    return z


def sd(scheduler, **config):
    """A scheduler of diffusers with Stable Diffusion's betas."""
    return scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **config)


@every_type
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_agrees_with_diffusers(prediction_type, eta):
    scheduler = sd(
        DDIMScheduler,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.set_timesteps(20)
    expected = theirs(scheduler, eta=eta, generator=torch.Generator().manual_seed(1))
    z = ours(partial(sampling.ddim, eta=eta), trailing_steps(20), draws(1), prediction_type)
    torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)


@every_type
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:.*dpmsolver:FutureWarning")
@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], trailing_steps(20), [999, 700, 650, 300, 20]])
@pytest.mark.parametrize(
    ("algorithm", "sampler"), [("dpmsolver++", sampling.dpm_solver_pp_2m), ("dpmsolver", sampling.dpm_solver_2m)]
)
def test_multistep_solvers_agree_with_diffusers(algorithm, sampler, prediction_type, timesteps):
    scheduler = sd(
        DPMSolverMultistepScheduler,
        prediction_type=prediction_type,
        algorithm_type=algorithm,
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(timesteps=timesteps)
    z = ours(sampler, timesteps, prediction_type=prediction_type)
    torch.testing.assert_close(z, theirs(scheduler), rtol=1e-3, atol=1e-3)


@every_type
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_consistency_agrees_with_diffusers(prediction_type, steps):
    scheduler = sd(LCMScheduler, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    expected = theirs(scheduler, generator=torch.Generator().manual_seed(1))
    z = ours(sampling.consistency, consistency_steps(steps), draws(1), prediction_type)
    torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("steps", "total", "mean"), [(1, 18.7097, 0.0244), (10, 197.7616, 0.2575)])
def test_golden_consistency(steps, total, mean):
    """The numbers of diffusers' own test of its LCMScheduler."""
    schedule = NoiseSchedule()
    z = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    denoise = conditioned(lambda z, t, cond, w: z * (t / (t + 1)).view(-1, 1, 1, 1), None, schedule)
    z0 = sampling.consistency(denoise, z, consistency_steps(steps), schedule=schedule, noise=draws(0, z))
    assert z0.abs().sum().item() == pytest.approx(total, abs=1e-2)
    assert z0.abs().mean().item() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_draws_noise_between_steps_only(steps):
    drawn = []
    ours(sampling.consistency, consistency_steps(steps), lambda: drawn.append(0) or torch.zeros_like(Z))
    assert len(drawn) == steps - 1


def test_ddim_with_eta_one_is_ddpm():
    ddim, ddpm = (ours(s, trailing_steps(10), draws(1)) for s in (partial(sampling.ddim, eta=1.0), sampling.ddpm))
    assert torch.equal(ddim, ddpm)


def test_ddim_is_the_ode_of_its_solver():
    ode = partial(sampling.ode, solver=instantiate(OmegaConf.load(CONF / "model/solver/ddim.yaml")))
    torch.testing.assert_close(ours(ode, trailing_steps(10)), ours(sampling.ddim, trailing_steps(10)))


@pytest.mark.parametrize("name", ODES)
def test_odes_reach_the_gaussian_solution(name):
    schedule = NoiseSchedule().double()
    data, z = Gaussian(schedule), torch.linspace(-2, 2, 9).double().view(9, 1, 1, 1)
    z0 = ODES[name](data.denoise, z, trailing_steps(200), schedule=schedule, noise=no_noise)
    start, end = torch.full((9,), 999), torch.zeros(9, dtype=torch.int64)
    torch.testing.assert_close(z0, data.flow(z, start, end), rtol=0, atol=0.025)


def test_ancestral_sampling_has_the_datas_moments():
    schedule = NoiseSchedule()
    data, noise = Gaussian(schedule), draws(0, torch.empty(1, 1, 128, 128))
    z0 = sampling.ddpm(data.denoise, noise(), trailing_steps(200), schedule=schedule, noise=noise)
    assert z0.mean().item() == pytest.approx(data.mu, abs=0.02)
    assert z0.std().item() == pytest.approx(data.s, abs=0.03)


def test_consistency_sampling_with_the_exact_function_has_the_datas_moments():
    """Any number of steps of a perfect consistency function samples the data; here x0 is the flow to t = 0."""
    schedule = NoiseSchedule()
    data, noise = Gaussian(schedule), draws(0, torch.empty(1, 1, 128, 128))
    exact = conditioned(lambda z, t, cond, w: data.flow(z, t, t * 0), None, NoiseSchedule(prediction_type="sample"))
    for steps in (1, 2, 4):
        z0 = sampling.consistency(exact, noise(), consistency_steps(steps), schedule=schedule, noise=noise)
        assert z0.mean().item() == pytest.approx(data.mu, abs=0.03)
        assert z0.std().item() == pytest.approx(data.s, abs=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_do_not_depend_on_their_batch(name):
    """Each with its own noise, as generate.py draws it."""

    def run(part):
        schedule = NoiseSchedule()
        noise = draws(1)
        denoise = conditioned(net, None, schedule)
        return SAMPLERS[name](denoise, Z[part], [999, 499, 99], schedule=schedule, noise=lambda: noise()[part])

    torch.testing.assert_close(run(slice(0, 2))[1:], run(slice(1, 2)), rtol=1e-4, atol=1e-5)
