"""Easy consistency tuning: golden noise levels, stages, targets and weights."""

import pytest
import torch

from lcm.core import losses
from lcm.core.errors import UserError
from lcm.core.objectives.consistency import Networks
from lcm.core.objectives.ect import EasyConsistencyTuning, EasyDraws
from lcm.core.process import VP, Flow
from lcm.core.timesteps import grid
from tests.core.gaussian import exact
from tests.core.test_objectives import SHAPE, B, Recorder, a_batch, denoisers, rng

every_process = pytest.mark.parametrize("process", [VP(), Flow(shift=3.0)], ids=["vp", "flow_3"])


def ect(process=None, **changes):
    return EasyConsistencyTuning(process or VP(), **{"timesteps": grid(), "distance": losses.l2, **changes})


def draws_at(*levels):
    return EasyDraws(torch.randn(SHAPE, generator=rng(2)), torch.tensor(levels), torch.linspace(2, 14, B))


@pytest.mark.parametrize(
    ("q", "stage", "near"),
    [(2.0, 0, [0.0, 0.0, 4.998184]), (256.0, 0, [0.098125, 0.987689, 9.960923]), (2.0, 7, [0.098125, 0.987689, 9.960923])],
)
def test_golden_levels(q, stage, near):
    objective = ect(q=q)
    objective.stage = stage
    assert objective.near_level(torch.tensor([0.1, 1.0, 10.0])).tolist() == pytest.approx(near, abs=1e-6)


def test_stages_follow_the_training():
    objective, stages = ect(), []
    for step in range(80):
        objective.advance(step, 80)
        stages.append(objective.stage)
    assert stages == [stage for stage in range(8) for _ in range(10)]


def test_stages_need_a_number_of_steps():
    with pytest.raises(UserError, match=r"8 stages of this method share trainer\.max_steps=-1"):
        ect().advance(0, -1)


def test_first_stage_is_denoising():
    """Below level 1 the target is the image for any target network."""
    seen = []
    objective = ect(distance=lambda x, y: seen.append(y) or losses.l2(x, y))
    objective.loss(denoisers(Recorder(0.1), Recorder(50.0)), a_batch(), draws_at(0.05, 0.2, 0.5, 0.9))
    assert torch.equal(seen[0], a_batch().z0)


@every_process
def test_networks_see_the_drawn_levels(process):
    online, target = Recorder(0.1), Recorder(0.1)
    objective = ect(process)
    objective.stage = 5
    draws = draws_at(0.2, 0.8, 2.0, 10.0)
    objective.loss(denoisers(online, target, process=process), a_batch(), draws)
    for recorder, level in ((online, draws.level), (target, objective.near_level(draws.level))):
        t = process.timestep_at(-level.log())
        torch.testing.assert_close(recorder.t, process.network_time(t))
        torch.testing.assert_close(recorder.z, process.jump(a_batch().z0, draws.eps, t))
        torch.testing.assert_close((-process.half_log_snr(t)).exp(), level, rtol=1e-3, atol=1e-4)


@every_process
def test_extreme_levels_stay_in_the_process(process):
    online = Recorder(0.1)
    loss, _ = ect(process).loss(denoisers(online, Recorder(0.1), process=process), a_batch(), draws_at(1e-9, 1e-3, 50.0, 1e9))
    assert loss.isfinite()
    limits = process.network_time(torch.tensor([process.t_min, process.num_timesteps - 1]).float())
    assert (online.t >= limits[0] - 1e-3).all()
    assert (online.t <= limits[1] + 1e-3).all()


def test_weight_is_the_inverse_distance_of_the_levels():
    """A distance of 1 everywhere leaves the mean weight."""
    objective = ect(distance=lambda x, y: torch.ones_like(x))
    levels = torch.tensor([0.1, 1.0, 5.0, 10.0])
    for stage in (0, 3):
        objective.stage = stage
        loss, _ = objective.loss(denoisers(Recorder(0.1), Recorder(0.1)), a_batch(), draws_at(*levels.tolist()))
        assert loss.item() == pytest.approx((1 / (levels - objective.near_level(levels))).mean().item(), rel=1e-5)


def test_exact_networks_have_no_loss_on_point_mass():
    student = exact(VP(), "v_prediction", mu=0.7, s=0.0)
    batch = a_batch(torch.full(SHAPE, 0.7))
    objective = ect()
    for objective.stage in (0, 4):
        assert objective.loss(Networks(student, student), batch, draws_at(0.05, 0.5, 2.0, 10.0))[0] < 1e-3


def test_levels_are_log_normal():
    level = ect().draw(torch.zeros(20_000, 1, 1, 1), rng()).level.log()
    assert level.mean().item() == pytest.approx(-1.1, abs=0.05)
    assert level.std().item() == pytest.approx(2.0, abs=0.05)


def test_q_of_1_is_an_error():
    with pytest.raises(UserError, match=r"model\.objective\.q=1 never brings the two times together: set it above 1"):
        ect(q=1.0)
