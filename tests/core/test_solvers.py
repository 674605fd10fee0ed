"""Every solver of conf/model/solver, new ones included, on Gaussian data, where the ODE has a closed-form solution."""

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
assert "ddim" in SOLVERS
ORDER = {name: 2 if solver.func.__name__.endswith("_2") or name == "heun" else 1 for name, solver in SOLVERS.items()}
every_solver = pytest.mark.parametrize("name", SOLVERS)

PROCESS = VP().double()
DATA = Gaussian(PROCESS)
FLOWS = [Flow(), Flow(shift=3.0)]
Z = torch.tensor([-1.0, 0.2, 1.7]).double().view(3, 1, 1, 1)


def at(t, z=Z):
    return torch.full((len(z),), t)


def error(solver, times, data=DATA):
    z = Z
    for t, s in pairwise(times):
        z = solver(data.denoise, z, at(t), at(s), process=data.process)
    return (z - data.flow(Z, at(times[0]), at(times[-1]))).abs().max().item()


@every_solver
def test_order_of_convergence(name):
    """Halving the step halves the error of a first-order solver and quarters that of a second-order one."""
    coarse, fine = (error(SOLVERS[name], list(range(900, 99, -step))) for step in (40, 20))
    assert coarse / fine == pytest.approx(2 ** ORDER[name], rel=0.05)


@every_solver
def test_many_steps_reach_solution(name):
    """The steps in a flow go from pure noise (lambda is minus infinity) to the clean end (lambda is infinite)."""
    assert error(SOLVERS[name], list(range(999, -1, -9))) < (0.02 if ORDER[name] == 1 else 0.004)
    for flow in FLOWS:
        assert error(SOLVERS[name], list(range(999, -2, -10)), Gaussian(flow)) < (0.03 if ORDER[name] == 1 else 0.004)


@pytest.mark.parametrize(("t", "s"), [(999, 0), (1, 0)])
def test_exact_steps_equal_ddim(t, s):
    """DPM-Solver-1 and Euler (constant eps) and first-order DPM-Solver++ (constant x0) are DDIM."""
    x0, eps = DATA.denoise(Z, at(t))
    ddim = solvers.ddim(DATA.denoise, Z, at(t), at(s), process=PROCESS)
    torch.testing.assert_close(solvers.eps_step(Z, x0, eps, at(t), at(s), PROCESS), ddim, rtol=0, atol=1e-6)
    torch.testing.assert_close(solvers.x0_step(Z, x0, at(t), at(s), PROCESS), ddim, rtol=0, atol=1e-6)


@every_solver
def test_neighbouring_timesteps(name):
    """Step from t to t - 1 for every t, each sample with its own t."""
    t = torch.arange(1, 1000)
    z = torch.full((999, 1, 1, 1), 0.7).double()
    step = SOLVERS[name](DATA.denoise, z, t, t - 1, process=PROCESS)
    torch.testing.assert_close(step, DATA.flow(z, t, t - 1), rtol=0, atol=1e-2)


@every_solver
def test_prediction_type_is_irrelevant(name):
    for process in (VP(), Flow()):
        denoisers = [exact(process, prediction_type).bound({}) for prediction_type in PREDICTION_TYPES]
        first, *others = (SOLVERS[name](denoise, Z.float(), at(699), at(499), process=process) for denoise in denoisers)
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=1e-5)


@every_solver
def test_zero_terminal_snr_is_finite(name):
    process = VP(rescale_betas_zero_snr=True)
    denoise = Denoiser(lambda z, time, cond, w: z.tanh(), process, "v_prediction").bound({})
    for s in (998, 979, 0):
        assert SOLVERS[name](denoise, Z.float(), at(999), at(s), process=process).isfinite().all()


POINT_MASS = [  # process, steps (t, s), tolerance
    (PROCESS, [(999, 979), (999, 0), (499, 479)], 1e-6),
    (VP(beta_schedule="squaredcos_cap_v2").double(), [(999, 979), (999, 0)], 1e-5),
    (VP(rescale_betas_zero_snr=True).double(), [(999, 979), (999, 0)], 1e-5),
    *((flow, [(999, 979), (999, -1), (499, 479), (19, -1), (0, -1)], 5e-6) for flow in FLOWS),
]


@every_solver
def test_one_step_solves_point_mass(name):
    """x0 and eps are constant along the trajectories."""
    for process, steps, tolerance in POINT_MASS:
        point = Gaussian(process, mu=0.7, s=0.0)
        for t, s in steps:
            step = SOLVERS[name](point.denoise, Z, at(t), at(s), process=process)
            torch.testing.assert_close(step, point.flow(Z, at(t), at(s)), rtol=0, atol=tolerance)


@every_solver
def test_step_of_length_zero_is_identity(name):
    """grid(points=1000) trains at t = 0, and trailing_steps of 667 and more end there."""
    torch.testing.assert_close(SOLVERS[name](DATA.denoise, Z, at(0), at(0), process=PROCESS), Z)


@pytest.mark.parametrize("process", [PROCESS, FLOWS[1]], ids=["vp", "flow_3"])
def test_midpoint_lies_between(process):
    t = torch.arange(2 if process is PROCESS else 1, 1000)
    for s in (t - 2, t // 2, torch.full_like(t, process.t_min)):
        m, r = solvers.midpoint(t, s, process)
        assert ((s <= m) & (m < t)).all()
        assert ((r > 0) & (r <= 1)).all()


def test_midpoint_halves_lambda():
    _, r = solvers.midpoint(torch.tensor([999, 699, 499]), torch.tensor([799, 499, 99]), PROCESS)
    assert r.tolist() == pytest.approx([0.5, 0.5, 0.5], abs=0.01)


def test_ddim_in_flow_is_euler():
    """Euler's step is `y + (q' - q) u`."""
    flow = FLOWS[1]
    t, s = torch.tensor([999, 499, 19]), torch.tensor([749, 19, -1])
    u = Z.float().cos()
    denoise = Denoiser(lambda z, time, cond, w: u, flow, "flow_prediction").bound({})
    step = solvers.ddim(denoise, Z.float(), t, s, process=flow)
    expected = Z.float() + (flow.sigma(s) - flow.sigma(t)).view(3, 1, 1, 1) * u
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-6)


def test_ddim_in_vp_is_euler_in_flow_coordinates():
    """`q = sigma / (alpha + sigma)`, `y = x / (alpha + sigma)`, `u = eps - x0`, for any network."""
    t, s = torch.tensor([999, 499, 259]), torch.tensor([759, 479, 0])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = PROCESS.at(t, 4), PROCESS.at(s, 4)
    reader = Denoiser(None, PROCESS, "v_prediction")

    def denoise(z, t):
        return reader.read((z + t.view(3, 1, 1, 1) / 1000).tanh(), z, t)

    x0, eps = denoise(Z, t)
    q_t, q_s = sigma_t / (alpha_t + sigma_t), sigma_s / (alpha_s + sigma_s)
    y_s = Z / (alpha_t + sigma_t) + (q_s - q_t) * (eps - x0)
    step = solvers.ddim(denoise, Z, t, s, process=PROCESS)
    torch.testing.assert_close(step / (alpha_s + sigma_s), y_s, rtol=0, atol=1e-6)  # float32 tables
