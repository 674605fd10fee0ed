"""Samplers against diffusers' schedulers and, for every yaml of conf/sampler, against closed forms on Gaussian data."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchLCMScheduler, LCMScheduler, TCDScheduler
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lcm.core import sampling
from lcm.core.denoiser import Denoiser
from lcm.core.process import VP, Flow
from lcm.core.timesteps import consistency_steps, trailing_steps
from tests.core.gaussian import Gaussian, network

CONF = Path(__file__).parents[2] / "conf"
SAMPLERS = {path.stem: instantiate(OmegaConf.load(path)) for path in sorted((CONF / "sampler").glob("*.yaml"))}
ODES = {name: sampler for name, sampler in SAMPLERS.items() if name not in ("lcm", "ddpm")}

every_ode = pytest.mark.parametrize("name", ODES)
two_processes = pytest.mark.parametrize("process", [VP(), Flow(shift=3.0)], ids=["vp", "flow_3"])
Z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def net(z, t, cond, w):
    return torch.tanh(z + t.view(-1, *(1,) * (z.ndim - 1)) / 1000)


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


def draws(seed, like=Z):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator)


def ours(sampler, timesteps, noise=no_noise, prediction_type="epsilon"):
    process = VP()
    return sampler(Denoiser(net, process, prediction_type).bound({}), Z, timesteps, process=process, noise=noise)


def theirs(scheduler, **step):
    z = Z
    for t in scheduler.timesteps:
        z = scheduler.step(net(z, t, None, None), t, z, **step).prev_sample
    return z


def sd(scheduler, **config):
    """Return a scheduler of diffusers with Stable Diffusion's betas."""
    return scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **config)


@pytest.mark.parametrize(("prediction_type", "eta"), [("epsilon", 0.0), ("v_prediction", 0.5), ("sample", 1.0)])
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


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:.*dpmsolver:FutureWarning")
@pytest.mark.parametrize(
    ("timesteps", "prediction_type"),
    [([999, 749, 499, 249], "epsilon"), (trailing_steps(20), "v_prediction"), ([999, 700, 650, 300, 20], "sample")],
)
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


@pytest.mark.parametrize(("prediction_type", "steps"), [("epsilon", 1), ("v_prediction", 2), ("sample", 4), ("epsilon", 8)])
def test_consistency_agrees_with_diffusers(prediction_type, steps):
    scheduler = sd(LCMScheduler, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    expected = theirs(scheduler, generator=torch.Generator().manual_seed(1))
    z = ours(sampling.consistency, consistency_steps(steps), draws(1), prediction_type)
    torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("steps", "total", "mean"), [(1, 18.7097, 0.0244), (10, 197.7616, 0.2575)])
def test_golden_consistency(steps, total, mean):
    """The expected values are from diffusers' test of LCMScheduler."""
    process = VP()
    z = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    denoise = Denoiser(lambda z, t, cond, w: z * (t / (t + 1)).view(-1, 1, 1, 1), process).bound({})
    z0 = sampling.consistency(denoise, z, consistency_steps(steps), process=process, noise=draws(0, z))
    assert z0.abs().sum().item() == pytest.approx(total, abs=1e-2)
    assert z0.abs().mean().item() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("sampler", [sampling.consistency, sampling.tcd])
def test_noise_is_drawn_between_steps_only(sampler):
    for steps in (1, 2, 4):
        drawn = []
        ours(sampler, consistency_steps(steps), lambda drawn=drawn: drawn.append(0) or torch.zeros_like(Z))
        assert len(drawn) == steps - 1


def test_ddim_with_eta_one_is_ddpm():
    ddim, ddpm = (ours(s, trailing_steps(10), draws(1)) for s in (partial(sampling.ddim, eta=1.0), sampling.ddpm))
    assert torch.equal(ddim, ddpm)


def test_ddim_is_the_ode_of_its_solver():
    ode = partial(sampling.ode, solver=instantiate(OmegaConf.load(CONF / "model/solver/ddim.yaml")))
    torch.testing.assert_close(ours(ode, trailing_steps(10)), ours(sampling.ddim, trailing_steps(10)))


@every_ode
def test_odes_reach_gaussian_solution(name):
    for process in (VP().double(), Flow(), Flow(shift=3.0)):
        data, z = Gaussian(process), torch.linspace(-2, 2, 9).double().view(9, 1, 1, 1)
        z0 = ODES[name](data.denoise, z, trailing_steps(200), process=process, noise=no_noise)
        start, end = torch.full((9,), 999), torch.full((9,), process.t_min)
        torch.testing.assert_close(z0, data.flow(z, start, end), rtol=0, atol=0.025)


@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
def test_ancestral_sampling_has_moments_of_data(process):
    data, noise = Gaussian(process), draws(0, torch.empty(1, 1, 128, 128))
    z0 = sampling.ddpm(data.denoise, noise(), trailing_steps(200), process=process, noise=noise)
    assert z0.mean().item() == pytest.approx(data.mu, abs=0.02)
    assert z0.std().item() == pytest.approx(data.s, abs=0.03)


@two_processes
def test_exact_consistency_function_samples_data(process):
    """The samplers agree for any number of steps."""
    data, noise = Gaussian(process), draws(0, torch.empty(1, 1, 128, 128))
    exact = network(process, "sample", data.end).bound({})
    for steps in (1, 2, 4):
        z0 = sampling.consistency(exact, noise(), consistency_steps(steps), process=process, noise=noise)
        assert z0.mean().item() == pytest.approx(data.mu, abs=0.03)
        assert z0.std().item() == pytest.approx(data.s, abs=0.02)


@pytest.mark.parametrize("name", ["lcm", "ddpm", "dpm_solver_pp_2m"])
def test_images_do_not_depend_on_batch(name):

    def run(part):
        process = VP()
        noise = draws(1)
        denoise = Denoiser(net, process).bound({})
        return SAMPLERS[name](denoise, Z[part], [999, 499, 99], process=process, noise=lambda: noise()[part])

    torch.testing.assert_close(run(slice(0, 2))[1:], run(slice(1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("process", [VP(rescale_betas_zero_snr=True), Flow()], ids=str)
def test_ancestral_sampling_from_pure_noise_is_finite(process):
    """The equality holds for every s, because the variance of eps is near 0."""
    data = Gaussian(process)
    for s in range(999):
        z0 = sampling.ddpm(data.denoise, Z[:1], [999, s], process=process, noise=draws(1, Z[:1]))
        assert z0.isfinite().all()


@pytest.mark.parametrize(("shift", "steps"), [(1.0, 1), (3.0, 2), (3.0, 8)])
def test_consistency_in_flow_agrees_with_diffusers(shift, steps):
    """diffusers gets our noise levels, as its own default for few steps differs."""
    flow = Flow(shift=shift)
    timesteps = consistency_steps(steps)
    scheduler = FlowMatchLCMScheduler(shift=flow.shift)
    scheduler.set_timesteps(sigmas=[(t + 1) / 1000 for t in timesteps])
    expected = theirs(scheduler, generator=torch.Generator().manual_seed(1))
    denoise = Denoiser(net, flow, "flow_prediction").bound({})
    z = sampling.consistency(denoise, Z, timesteps, process=flow, noise=draws(1))
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


# TCD


@pytest.mark.parametrize(
    ("prediction_type", "gamma", "steps"),
    [("epsilon", 0.3, 1), ("v_prediction", 0.0, 2), ("sample", 1.0, 4), ("epsilon", 1.0, 8)],
)
def test_tcd_agrees_with_diffusers(prediction_type, steps, gamma):
    scheduler = sd(TCDScheduler, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    expected = theirs(scheduler, eta=gamma, generator=torch.Generator().manual_seed(1))
    assert scheduler.timesteps.tolist() == consistency_steps(steps)
    z = ours(partial(sampling.tcd, gamma=gamma), consistency_steps(steps), draws(1), prediction_type)
    torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("gamma", "end"), [(0.3, 24.981589579), (0.0, 21.932223439), (1.0, 26.830767712)])
def test_golden_tcd(gamma, end):
    """999 -> 759 -> 499 -> 259 -> 0 with a network that returns -0.5, and noise 0.25."""
    process, z = VP(), torch.ones(1, 1, 1, 1)
    denoise = Denoiser(lambda z, t, cond, w: torch.full_like(z, -0.5), process).bound({})
    noise = lambda: torch.full_like(z, 0.25)  # noqa: E731
    z0 = sampling.tcd(denoise, z, [999, 759, 499, 259], process=process, noise=noise, gamma=gamma)
    assert z0.item() == pytest.approx(end, rel=2e-6)


def test_tcd_with_gamma_zero_is_ddim():
    process = VP()
    denoise = Denoiser(net, process, "v_prediction").bound({})
    tcd, ddim = (
        sampler(denoise, Z, consistency_steps(4), process=process, noise=no_noise)
        for sampler in (partial(sampling.tcd, gamma=0.0), sampling.ddim)
    )
    torch.testing.assert_close(tcd, ddim, rtol=1e-5, atol=1e-6)


def test_tcd_with_gamma_one_is_consistency_in_flow():
    """Every step jumps to the clean end, where z is x0."""
    flow = Flow(shift=3.0)
    denoise = Denoiser(net, flow, "flow_prediction").bound({})
    tcd, consistency = (
        sampler(denoise, Z, consistency_steps(4), process=flow, noise=draws(1))
        for sampler in (partial(sampling.tcd, gamma=1.0), sampling.consistency)
    )
    torch.testing.assert_close(tcd, consistency, rtol=1e-5, atol=1e-5)


@two_processes
def test_tcd_keeps_noise_level_of_process(process):
    """With a perfect network for a point mass, z_t is N(alpha mu, sigma^2)."""
    point, noise, calls = Gaussian(process, mu=0.7, s=0.0), draws(0, torch.empty(1, 1, 256, 256)), []

    def denoise(z, t):
        calls.append((z, t))
        return point.denoise(z, t)

    start = process.jump(torch.full((1, 1, 256, 256), 0.7), noise(), torch.tensor([999]))
    sampling.tcd(denoise, start, [999, 759, 499, 259], process=process, noise=noise, gamma=0.3)
    assert [t.item() for _, t in calls] == [999, 759, 499, 259]
    for z, t in calls:
        assert z.mean().item() == pytest.approx(0.7 * process.alpha(t).item(), abs=0.02)
        assert z.std().item() == pytest.approx(process.sigma(t).item(), abs=0.02)


def test_tcd_end_times():
    """In a flow of shift 1 the end has noise `(1 - gamma) sigma`, rounded to its grid."""
    flow, ends = Flow(), []

    class Spy(Flow):
        def jump(self, x0, eps, t):
            ends.append(t[0].item())
            return super().jump(x0, eps, t)

    denoise = Denoiser(net, flow, "flow_prediction").bound({})
    sampling.tcd(denoise, Z, [999, 749, 499, 249], process=Spy(), noise=draws(1), gamma=0.3)
    assert ends[-1] == -1
    sigma = flow.sigma(torch.tensor(ends[:-1]))
    torch.testing.assert_close(sigma, 0.7 * torch.tensor([0.75, 0.5, 0.25]), rtol=0, atol=1.01e-3)


@pytest.mark.parametrize("name", ["dpm_solver_2m", "dpm_solver_pp_2m"])
def test_multistep_odes_in_flow_solve_point_mass(name):
    """The sampler goes from pure noise to the clean end."""
    flow = Flow()
    point = Gaussian(flow, mu=0.7, s=0.0)
    for steps in (1, 20):
        z0 = ODES[name](point.denoise, Z.double(), trailing_steps(steps), process=flow, noise=no_noise)
        torch.testing.assert_close(z0, torch.full_like(z0, 0.7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", [sampling.dpm_solver_2m, sampling.dpm_solver_pp_2m])
def test_multistep_ends_in_flow_with_last_x0(sampler):
    """The last step, to an infinite lambda, is first order."""
    calls, denoise = [], Denoiser(net, Flow(), "flow_prediction").bound({})
    z0 = sampler(lambda z, t: calls.append(denoise(z, t)) or calls[-1], Z, trailing_steps(20), process=Flow(), noise=no_noise)
    torch.testing.assert_close(z0, calls[-1].x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "process"), [("lcm", VP()), ("ddpm", VP()), ("heun", Flow(shift=3.0))], ids=str)
def test_known_part_keeps_the_noise_of_its_time(name, process):
    """With every sampler, each network call gets the known part with the noise of its time. The rest is drawn."""
    known, mask = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(3)), torch.zeros(2, 1, 32, 32)
    mask[..., 16:] = 1
    seen = []

    def denoise(z, t):
        alpha, sigma = process.at(t, 4)
        if sigma.min() > 0:  # Heun also looks at the end of a flow
            seen.append(((z - alpha * known) / sigma)[..., :16].std().item())
        return Gaussian(process, s=0.0).denoise(z, t)

    noise = draws(0, known)
    timesteps = trailing_steps(6)[2:]
    z = process.jump(known, noise(), torch.full((2,), timesteps[0]))
    end = SAMPLERS[name](sampling.keep_known(denoise, known, mask, process), z, timesteps, process=process, noise=noise)
    assert len(seen) >= 4
    assert all(0.95 < std < 1.05 for std in seen), seen
    assert (end[..., 16:] - 0.3).abs().mean() < 0.05
