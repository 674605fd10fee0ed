"""Every solver of conf/model/solver on Gaussian data, where the ODE's solution is known. A new yaml is tested unasked."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lcm.core import solvers
from lcm.core.networks import conditioned
from lcm.core.prediction import PREDICTION_TYPES
from lcm.core.schedule import NoiseSchedule
from tests.core.gaussian import Gaussian

YAMLS = sorted((Path(__file__).parents[2] / "conf/model/solver").glob("*.yaml"))
SOLVERS = {path.stem: instantiate(OmegaConf.load(path)) for path in YAMLS}
ORDER = {name: 2 if solver.func.__name__.endswith("_2") or name == "heun" else 1 for name, solver in SOLVERS.items()}
every_solver = pytest.mark.parametrize("name", SOLVERS)

SCHEDULE = NoiseSchedule().double()
DATA = Gaussian(SCHEDULE)
Z = torch.tensor([-1.0, 0.2, 1.7]).double().view(3, 1, 1, 1)


def at(t, z=Z):
    return torch.full((len(z),), t)


def error(solver, times):
    z = Z
    for t, s in pairwise(times):
        z = solver(DATA.denoise, z, at(t), at(s), schedule=SCHEDULE)
    return (z - DATA.flow(Z, at(times[0]), at(times[-1]))).abs().max().item()


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
    ours, ddim = (f(DATA.denoise, Z, at(t), at(s), schedule=SCHEDULE) for f in (SOLVERS[name], solvers.ddim))
    torch.testing.assert_close(ours, ddim, rtol=0, atol=1e-6)


@every_solver
def test_neighbouring_timesteps(name):
    """t -> t - 1 for every t at once, each sample with its own t."""
    t = torch.arange(1, 1000)
    z = torch.full((999, 1, 1, 1), 0.7).double()
    step = SOLVERS[name](DATA.denoise, z, t, t - 1, schedule=SCHEDULE)
    torch.testing.assert_close(step, DATA.flow(z, t, t - 1), rtol=0, atol=1e-2)


@every_solver
def test_prediction_type_does_not_matter(name):
    results = []
    for prediction_type in PREDICTION_TYPES:
        schedule = NoiseSchedule(prediction_type=prediction_type)
        data = Gaussian(schedule)

        def net(z, t, cond, w, schedule=schedule, data=data):
            return schedule.target(*data.denoise(z, t), t)

        denoise = conditioned(net, torch.zeros(3, 1, 1), schedule)
        results.append(SOLVERS[name](denoise, Z.float(), at(699), at(499), schedule=schedule))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-5)


@every_solver
@pytest.mark.parametrize("s", [998, 979, 0])
def test_zero_terminal_snr_stays_finite(name, s):
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    denoise = conditioned(lambda z, t, cond, w: z.tanh(), torch.zeros(3, 1, 1), schedule)
    assert SOLVERS[name](denoise, Z.float(), at(999), at(s), schedule=schedule).isfinite().all()


@every_solver
@pytest.mark.parametrize(("t", "s"), [(999, 979), (999, 0), (499, 479)])
def test_a_point_mass_is_solved_in_one_step(name, t, s):
    """x0 and eps are constant along its paths."""
    point = Gaussian(SCHEDULE, mu=0.7, s=0.0)
    step = SOLVERS[name](point.denoise, Z, at(t), at(s), schedule=SCHEDULE)
    torch.testing.assert_close(step, point.flow(Z, at(t), at(s)), rtol=0, atol=1e-6)


@every_solver
@pytest.mark.parametrize("s", [979, 0])
@pytest.mark.parametrize("config", [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}])
def test_a_point_mass_is_solved_in_one_step_from_pure_noise(name, s, config):
    schedule = NoiseSchedule(**config).double()
    point = Gaussian(schedule, mu=0.7, s=0.0)
    step = SOLVERS[name](point.denoise, Z, at(999), at(s), schedule=schedule)
    torch.testing.assert_close(step, point.flow(Z, at(999), at(s)), rtol=0, atol=1e-5)


@every_solver
def test_a_step_of_no_length_changes_nothing(name):
    """As grid(points=1000) trains at t = 0, and trailing_steps(667) and more end with."""
    torch.testing.assert_close(SOLVERS[name](DATA.denoise, Z, at(0), at(0), schedule=SCHEDULE), Z)


def test_midpoint_lies_between():
    t = torch.arange(2, 1000)
    for s in (t - 2, t // 2, torch.zeros_like(t)):
        m, r = solvers.midpoint(t, s, SCHEDULE)
        assert ((s <= m) & (m < t)).all()
        assert ((r > 0) & (r <= 1)).all()


def test_midpoint_halves_lambda():
    _, r = solvers.midpoint(torch.tensor([999, 699, 499]), torch.tensor([799, 499, 99]), SCHEDULE)
    assert r.tolist() == pytest.approx([0.5, 0.5, 0.5], abs=0.01)
