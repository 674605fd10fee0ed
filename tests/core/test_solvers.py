"""Every solver of conf/model/solver on Gaussian data, where the ODE's solution is known. A new yaml is tested unasked."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lcm.core import solvers
from lcm.core.denoiser import PREDICTION_TYPES, Denoiser
from lcm.core.process import VP, Flow
from tests.core.gaussian import Gaussian, exact

YAMLS = sorted((Path(__file__).parents[2] / "conf/model/solver").glob("*.yaml"))
SOLVERS = {path.stem: instantiate(OmegaConf.load(path)) for path in YAMLS}
ORDER = {name: 2 if solver.func.__name__.endswith("_2") or name == "heun" else 1 for name, solver in SOLVERS.items()}
every_solver = pytest.mark.parametrize("name", SOLVERS)

PROCESS = VP().double()
DATA = Gaussian(PROCESS)
FLOWS = [Flow(), Flow(shift=3.0)]
every_flow = pytest.mark.parametrize("flow", FLOWS, ids=["shift_1", "shift_3"])
Z = torch.tensor([-1.0, 0.2, 1.7]).double().view(3, 1, 1, 1)


def at(t, z=Z):
    return torch.full((len(z),), t)


def error(solver, times, data=DATA):
    z = Z
    for t, s in pairwise(times):
        z = solver(data.denoise, z, at(t), at(s), process=data.process)
    return (z - data.flow(Z, at(times[0]), at(times[-1]))).abs().max().item()


def test_the_folder_was_found():
    assert "ddim" in SOLVERS


@every_solver
def test_order_of_convergence(name):
    """Twice the steps, half the error of a first-order solver, a quarter of a second-order one's."""
    coarse, fine = (error(SOLVERS[name], list(range(900, 99, -step))) for step in (40, 20))
    assert coarse / fine == pytest.approx(2 ** ORDER[name], rel=0.05)


@every_solver
def test_many_steps_reach_the_solution(name):
    assert error(SOLVERS[name], list(range(999, -1, -9))) < (0.02 if ORDER[name] == 1 else 0.004)


@pytest.mark.parametrize("name", [name for name in SOLVERS if ORDER[name] == 1])
@pytest.mark.parametrize(("t", "s"), [(999, 979), (999, 0), (499, 479), (19, 0), (1, 0)])
def test_first_order_solvers_are_ddim(name, t, s):
    ours, ddim = (f(DATA.denoise, Z, at(t), at(s), process=PROCESS) for f in (SOLVERS[name], solvers.ddim))
    torch.testing.assert_close(ours, ddim, rtol=0, atol=1e-6)


@every_solver
def test_neighbouring_timesteps(name):
    """t -> t - 1 for every t at once, each sample with its own t."""
    t = torch.arange(1, 1000)
    z = torch.full((999, 1, 1, 1), 0.7).double()
    step = SOLVERS[name](DATA.denoise, z, t, t - 1, process=PROCESS)
    torch.testing.assert_close(step, DATA.flow(z, t, t - 1), rtol=0, atol=1e-2)


@every_solver
@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
def test_prediction_type_does_not_matter(name, process):
    results = []
    for prediction_type in PREDICTION_TYPES:
        denoise = exact(process, prediction_type).bound({})
        results.append(SOLVERS[name](denoise, Z.float(), at(699), at(499), process=process))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)


@every_solver
@pytest.mark.parametrize("s", [998, 979, 0])
def test_zero_terminal_snr_stays_finite(name, s):
    process = VP(rescale_betas_zero_snr=True)
    denoise = Denoiser(lambda z, time, cond, w: z.tanh(), process, "v_prediction").bound({})
    assert SOLVERS[name](denoise, Z.float(), at(999), at(s), process=process).isfinite().all()


@every_solver
@pytest.mark.parametrize(("t", "s"), [(999, 979), (999, 0), (499, 479)])
def test_a_point_mass_is_solved_in_one_step(name, t, s):
    """x0 and eps are constant along its paths."""
    point = Gaussian(PROCESS, mu=0.7, s=0.0)
    step = SOLVERS[name](point.denoise, Z, at(t), at(s), process=PROCESS)
    torch.testing.assert_close(step, point.flow(Z, at(t), at(s)), rtol=0, atol=1e-6)


@every_solver
@pytest.mark.parametrize("s", [979, 0])
@pytest.mark.parametrize("config", [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}])
def test_a_point_mass_is_solved_in_one_step_from_pure_noise(name, s, config):
    process = VP(**config).double()
    point = Gaussian(process, mu=0.7, s=0.0)
    step = SOLVERS[name](point.denoise, Z, at(999), at(s), process=process)
    torch.testing.assert_close(step, point.flow(Z, at(999), at(s)), rtol=0, atol=1e-5)


@every_solver
def test_a_step_of_no_length_changes_nothing(name):
    """As grid(points=1000) trains at t = 0, and trailing_steps(667) and more end with."""
    torch.testing.assert_close(SOLVERS[name](DATA.denoise, Z, at(0), at(0), process=PROCESS), Z)


def test_midpoint_lies_between():
    t = torch.arange(2, 1000)
    for s in (t - 2, t // 2, torch.zeros_like(t)):
        m, r = solvers.midpoint(t, s, PROCESS)
        assert ((s <= m) & (m < t)).all()
        assert ((r > 0) & (r <= 1)).all()


def test_midpoint_halves_lambda():
    _, r = solvers.midpoint(torch.tensor([999, 699, 499]), torch.tensor([799, 499, 99]), PROCESS)
    assert r.tolist() == pytest.approx([0.5, 0.5, 0.5], abs=0.01)


# flow


@every_flow
@every_solver
def test_order_of_convergence_in_a_flow(name, flow):
    data = Gaussian(flow)
    coarse, fine = (error(SOLVERS[name], list(range(899, 98, -step)), data) for step in (40, 20))
    assert coarse / fine == pytest.approx(2 ** ORDER[name], rel=0.1)


@every_flow
@every_solver
@pytest.mark.parametrize("start", [899, 999])
def test_many_steps_reach_the_solution_of_a_flow(name, flow, start):
    """Also to the clean end, where lambda is infinite, and from pure noise, where it is minus infinity."""
    assert error(SOLVERS[name], list(range(start, -2, -10)), Gaussian(flow)) < (0.03 if ORDER[name] == 1 else 0.004)


@every_flow
def test_ddim_in_a_flow_is_euler(flow):
    """`y + (q' - q) u`."""
    t, s = torch.tensor([999, 499, 19]), torch.tensor([749, 19, -1])
    u = Z.float().cos()
    denoise = Denoiser(lambda z, time, cond, w: u, flow, "flow_prediction").bound({})
    step = solvers.ddim(denoise, Z.float(), t, s, process=flow)
    expected = Z.float() + (flow.sigma(s) - flow.sigma(t)).view(3, 1, 1, 1) * u
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-6)


def test_ddim_in_vp_is_euler_in_flow_coordinates():
    """`q = sigma / (alpha + sigma)`, `y = x / (alpha + sigma)`, `u = eps - x0`; of any network, right or wrong."""
    t, s = torch.tensor([999, 499, 259]), torch.tensor([759, 479, 0])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = PROCESS.at(t, 4), PROCESS.at(s, 4)

    def denoise(z, t):
        return of_vp.read((z + t.view(3, 1, 1, 1) / 1000).tanh(), z, t)

    of_vp = Denoiser(None, PROCESS, "v_prediction")
    x0, eps = denoise(Z, t)
    q_t, q_s = sigma_t / (alpha_t + sigma_t), sigma_s / (alpha_s + sigma_s)
    y_s = Z / (alpha_t + sigma_t) + (q_s - q_t) * (eps - x0)
    step = solvers.ddim(denoise, Z, t, s, process=PROCESS)
    torch.testing.assert_close(step / (alpha_s + sigma_s), y_s, rtol=0, atol=1e-6)  # float32 tables


@every_flow
@every_solver
@pytest.mark.parametrize(("t", "s"), [(999, 979), (999, -1), (499, 479), (19, -1), (0, -1)])
def test_a_point_mass_is_solved_in_one_step_of_a_flow(name, flow, t, s):
    """Its paths are straight."""
    point = Gaussian(flow, mu=0.7, s=0.0)
    step = SOLVERS[name](point.denoise, Z, at(t), at(s), process=flow)
    torch.testing.assert_close(step, point.flow(Z, at(t), at(s)), rtol=0, atol=5e-6)


@every_flow
def test_midpoint_lies_between_in_a_flow(flow):
    t = torch.arange(1, 1000)
    for s in (t - 2, t // 2, torch.full_like(t, -1)):
        m, r = solvers.midpoint(t, s, flow)
        assert ((s <= m) & (m < t)).all()
        assert ((r > 0) & (r <= 1)).all()
