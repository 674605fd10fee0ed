"""Samplers against diffusers' schedulers and, with every yaml of conf/solver, against Gaussian data's closed forms."""

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
for path in sorted((CONF / "model/solver").glob("*.yaml")):
    ODES[f"model/{path.stem}"] = partial(sampling.ode, solver=instantiate(OmegaConf.load(path)))

every_type = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])  # that diffusers knows in VP
every_flow = pytest.mark.parametrize("flow", [Flow(), Flow(shift=3.0)], ids=["shift_1", "shift_3"])
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
    process = VP()
    z = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    denoise = Denoiser(lambda z, t, cond, w: z * (t / (t + 1)).view(-1, 1, 1, 1), process).bound({})
    z0 = sampling.consistency(denoise, z, consistency_steps(steps), process=process, noise=draws(0, z))
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
    process = VP().double()
    data, z = Gaussian(process), torch.linspace(-2, 2, 9).double().view(9, 1, 1, 1)
    z0 = ODES[name](data.denoise, z, trailing_steps(200), process=process, noise=no_noise)
    start, end = torch.full((9,), 999), torch.zeros(9, dtype=torch.int64)
    torch.testing.assert_close(z0, data.flow(z, start, end), rtol=0, atol=0.025)


@every_flow
@pytest.mark.parametrize("name", ODES)
def test_odes_reach_the_gaussian_solution_of_a_flow(name, flow):
    data, z = Gaussian(flow), torch.linspace(-2, 2, 9).double().view(9, 1, 1, 1)
    z0 = ODES[name](data.denoise, z, trailing_steps(200), process=flow, noise=no_noise)
    start, end = torch.full((9,), 999), torch.full((9,), -1)
    torch.testing.assert_close(z0, data.flow(z, start, end), rtol=0, atol=0.025)


@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
def test_ancestral_sampling_has_the_datas_moments(process):
    data, noise = Gaussian(process), draws(0, torch.empty(1, 1, 128, 128))
    z0 = sampling.ddpm(data.denoise, noise(), trailing_steps(200), process=process, noise=noise)
    assert z0.mean().item() == pytest.approx(data.mu, abs=0.02)
    assert z0.std().item() == pytest.approx(data.s, abs=0.03)


@pytest.mark.parametrize("process", [VP(), Flow(), Flow(shift=3.0)], ids=["vp", "flow", "flow_3"])
def test_consistency_sampling_with_the_exact_function_has_the_datas_moments(process):
    """Any number of steps of a perfect consistency function samples the data."""
    data, noise = Gaussian(process), draws(0, torch.empty(1, 1, 128, 128))
    exact = network(process, "sample", data.end).bound({})
    for steps in (1, 2, 4):
        z0 = sampling.consistency(exact, noise(), consistency_steps(steps), process=process, noise=noise)
        assert z0.mean().item() == pytest.approx(data.mu, abs=0.03)
        assert z0.std().item() == pytest.approx(data.s, abs=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_do_not_depend_on_their_batch(name):
    """Each with its own noise, as generate.py draws it."""

    def run(part):
        process = VP()
        noise = draws(1)
        denoise = Denoiser(net, process).bound({})
        return SAMPLERS[name](denoise, Z[part], [999, 499, 99], process=process, noise=lambda: noise()[part])

    torch.testing.assert_close(run(slice(0, 2))[1:], run(slice(1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("process", [VP(rescale_betas_zero_snr=True), VP(beta_schedule="squaredcos_cap_v2"), Flow()], ids=str)
def test_ancestral_sampling_from_pure_noise_stays_finite(process):
    """For every s: the variance that is left to eps is near 0."""
    data = Gaussian(process)
    for s in range(999):
        z0 = sampling.ddpm(data.denoise, Z[:1], [999, s], process=process, noise=draws(1, Z[:1]))
        assert z0.isfinite().all()


@every_flow
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_consistency_in_a_flow_agrees_with_diffusers(flow, steps):
    """It is given our noise levels, which its own `set_timesteps` would not take for few steps."""
    timesteps = consistency_steps(steps)
    scheduler = FlowMatchLCMScheduler(shift=flow.shift)
    scheduler.set_timesteps(sigmas=[(t + 1) / 1000 for t in timesteps])
    expected = theirs(scheduler, generator=torch.Generator().manual_seed(1))
    denoise = Denoiser(net, flow, "flow_prediction").bound({})
    z = sampling.consistency(denoise, Z, timesteps, process=flow, noise=draws(1))
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


# TCD


@every_type
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_tcd_agrees_with_diffusers(prediction_type, steps, gamma):
    scheduler = sd(TCDScheduler, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    expected = theirs(scheduler, eta=gamma, generator=torch.Generator().manual_seed(1))
    assert scheduler.timesteps.tolist() == consistency_steps(steps)
    z = ours(partial(sampling.tcd, gamma=gamma), consistency_steps(steps), draws(1), prediction_type)
    torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("gamma", "end"), [(0.3, 24.981589579), (0.0, 21.932223439), (1.0, 26.830767712)])
def test_golden_tcd(gamma, end):
    """999 -> 759 -> 499 -> 259 -> 0 of a network that answers -0.5, with noise 0.25."""
    process, z = VP(), torch.ones(1, 1, 1, 1)
    denoise = Denoiser(lambda z, t, cond, w: torch.full_like(z, -0.5), process).bound({})
    noise = lambda: torch.full_like(z, 0.25)  # noqa: E731
    z0 = sampling.tcd(denoise, z, [999, 759, 499, 259], process=process, noise=noise, gamma=gamma)
    assert z0.item() == pytest.approx(end, rel=2e-6)


@pytest.mark.parametrize("process", [VP(), Flow(), Flow(shift=3.0)], ids=["vp", "flow", "flow_3"])
def test_tcd_without_noise_is_ddim(process):
    """It then draws none."""
    denoise = Denoiser(net, process, "v_prediction").bound({})
    tcd, ddim = (
        sampler(denoise, Z, consistency_steps(4), process=process, noise=no_noise)
        for sampler in (partial(sampling.tcd, gamma=0.0), sampling.ddim)
    )
    torch.testing.assert_close(tcd, ddim, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_tcd_draws_noise_between_steps_only(steps):
    drawn = []
    ours(sampling.tcd, consistency_steps(steps), lambda: drawn.append(0) or torch.zeros_like(Z))
    assert len(drawn) == steps - 1


@every_flow
def test_tcd_with_gamma_one_is_consistency_sampling_in_a_flow(flow):
    """Every step jumps to the clean end, where nothing of z is left beside x0."""
    denoise = Denoiser(net, flow, "flow_prediction").bound({})
    tcd, consistency = (
        sampler(denoise, Z, consistency_steps(4), process=flow, noise=draws(1))
        for sampler in (partial(sampling.tcd, gamma=1.0), sampling.consistency)
    )
    torch.testing.assert_close(tcd, consistency, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("process", [VP(), Flow(), Flow(shift=3.0)], ids=["vp", "flow", "flow_3"])
def test_tcd_on_a_point_mass_has_the_process_own_noise_at_every_step(process, gamma):
    """Of a perfect network the point that is asked for at t is N(alpha mu, sigma^2)."""
    point, noise, asked = Gaussian(process, mu=0.7, s=0.0), draws(0, torch.empty(1, 1, 256, 256)), []

    def denoise(z, t):
        asked.append((z, t))
        return point.denoise(z, t)

    start = process.jump(torch.full((1, 1, 256, 256), 0.7), noise(), torch.tensor([999]))
    sampling.tcd(denoise, start, [999, 759, 499, 259], process=process, noise=noise, gamma=gamma)
    assert [t.item() for _, t in asked] == [999, 759, 499, 259]
    for z, t in asked:
        assert z.mean().item() == pytest.approx(0.7 * process.alpha(t).item(), abs=0.02)
        assert z.std().item() == pytest.approx(process.sigma(t).item(), abs=0.02)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.7])
def test_tcd_jumps_to_a_share_of_the_way_from_the_clean_end(gamma):
    """In a flow of shift 1 that is `(1 - gamma) sigma`, on its grid."""
    flow, ends = Flow(), []

    class Spy(Flow):
        def jump(self, x0, eps, t):
            ends.append(t[0].item())
            return super().jump(x0, eps, t)

    denoise = Denoiser(net, flow, "flow_prediction").bound({})
    sampling.tcd(denoise, Z, [999, 749, 499, 249], process=Spy(), noise=draws(1), gamma=gamma)
    assert ends[-1] == -1
    sigma = flow.sigma(torch.tensor(ends[:-1]))
    torch.testing.assert_close(sigma, (1 - gamma) * torch.tensor([0.75, 0.5, 0.25]), rtol=0, atol=1.01e-3)


@pytest.mark.parametrize("name", ODES)
@pytest.mark.parametrize("steps", [1, 20])
def test_odes_of_a_flow_solve_a_point_mass(name, steps):
    """From pure noise to the clean end itself."""
    flow = Flow()
    point = Gaussian(flow, mu=0.7, s=0.0)
    z0 = ODES[name](point.denoise, Z.double(), trailing_steps(steps), process=flow, noise=no_noise)
    torch.testing.assert_close(z0, torch.full_like(z0, 0.7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", [sampling.dpm_solver_2m, sampling.dpm_solver_pp_2m])
def test_multistep_solvers_end_a_flow_with_the_last_x0(sampler):
    """The last step, to an infinite lambda, is first order."""
    read, denoise = [], Denoiser(net, Flow(), "flow_prediction").bound({})
    z0 = sampler(lambda z, t: read.append(denoise(z, t)) or read[-1], Z, trailing_steps(20), process=Flow(), noise=no_noise)
    torch.testing.assert_close(z0, read[-1].x0, rtol=0, atol=1e-5)
