"""Trajectory consistency distillation: the loss in closed form, end times, and the saved sampler and scheduler."""

import diffusers
import pytest
import torch

from lcm.core import losses, solvers
from lcm.core.denoiser import PREDICTION_TYPES
from lcm.core.errors import UserError
from lcm.core.objectives.consistency import ConsistencyDraws, Networks
from lcm.core.objectives.distillation import LatentConsistencyDistillation
from lcm.core.objectives.tcd import TrajectoryConsistencyDistillation, TrajectoryDraws
from lcm.core.process import VP, Flow
from lcm.core.timesteps import consistency_steps, full, grid, trailing_steps
from tests.core.gaussian import exact
from tests.core.test_objectives import SHAPE, B, Recorder, Scale, a_batch, denoisers, returns_caption, rng, some_draws


def tcd(process=None, **changes):
    gamma = {"gamma": 0.0} if isinstance(process, Flow) else {}  # other values are an error in a flow
    options = {"timesteps": grid(), "solver": solvers.ddim, "distance": losses.l2, **gamma, **changes}
    return TrajectoryConsistencyDistillation(process or VP(), **options)


def shares(share, *index):
    draws = some_draws(*index)
    return TrajectoryDraws(draws.eps, draws.index, draws.w, torch.full((B,), share))


@pytest.mark.parametrize("max_steps", [-1, 0])
def test_needs_no_number_of_steps(max_steps):
    """A curriculum of one stage needs no number of steps. The training may end by time or on a signal."""
    objective = tcd()
    for step in range(3):
        objective.advance(step, max_steps)
    assert objective.edges.tolist() == [0]


def test_golden_tcd():
    """499 -> 479, then on to 259, or ending at 479; student eps -1.1, target eps -0.9, teacher -1.0 and -0.8 (null), w = 7."""
    for m, student, target, loss in (
        (259, -0.367413529, -0.386213296, 0.000353431),
        (479, -0.729881134, -0.655421806, 0.005544192),
    ):
        share = (grid().tolist().index(m) + 1.5) / 25  # of the clean end and the 24 points up to 479
        seen = []
        objective = tcd(distance=lambda x, y, seen=seen: seen.extend((x.item(), y.item())) or losses.l2(x, y))
        one = torch.ones(1, 1, 1, 1)
        value, logs = objective.loss(
            denoisers(Recorder(-1.1), Recorder(-0.9), returns_caption),
            a_batch(0.5 * one, cond=-1.0, uncond=-0.8),
            TrajectoryDraws(-1.2 * one, torch.tensor([24]), torch.tensor([7.0]), torch.tensor([share])),
        )
        assert seen == pytest.approx([student, target], abs=2e-6)
        assert value.item() == logs["consistency_l2"].item() == pytest.approx(loss, abs=1e-6)


def test_golden_tcd_in_flow():
    """sigma 0.75 -> 0.70, then to the clean end, gives LCM's loss: `f = y - sigma u`."""
    flow, seen, one = Flow(num_train_timesteps=20), [], torch.ones(1, 1, 1, 1)
    loss, _ = tcd(
        flow,
        timesteps=grid(20, points=20),
        skip_steps=1,
        distance=lambda x, y: seen.extend((x.item(), y.item())) or losses.l2(x, y),
    ).loss(
        denoisers(Recorder(-1.9), Recorder(-1.5), returns_caption, process=flow, prediction_type="flow_prediction"),
        a_batch(0.5 * one, cond=-1.6, uncond=-1.4),
        TrajectoryDraws(-1.2 * one, torch.tensor([14]), torch.tensor([4.0]), torch.zeros(1)),
    )
    assert seen == pytest.approx([0.650, 0.395], abs=1e-6)
    assert loss.item() == pytest.approx(0.065025, abs=1e-6)


def test_clean_end_alone_is_lcm_in_flow():
    flow, draws = Flow(shift=3.0), shares(0.0)
    nets = denoisers(Scale(0.5), Scale(0.4), Scale(0.3), process=flow, prediction_type="flow_prediction")
    lcd = LatentConsistencyDistillation(flow, timesteps=grid(), solver=solvers.ddim, distance=losses.l2)
    expected = lcd.loss(nets, a_batch(), ConsistencyDraws(draws.eps, draws.index, draws.w))[0]
    torch.testing.assert_close(tcd(flow).loss(nets, a_batch(), draws)[0], expected)


def test_clean_end_alone_is_jump_to_0_in_vp():
    """The jump has no scalings. It is `alpha_0 x0 + sigma_0 eps`."""
    online, seen, process = Recorder(-1.1), [], VP()
    objective = tcd(distance=lambda x, y: seen.append(x) or losses.l2(x, y))
    objective.loss(denoisers(online, Scale(0.4), Scale(0.3)), a_batch(), shares(0.0))
    alpha, sigma = process.at(online.t, 4)
    x0 = (online.z + 1.1 * sigma) / alpha
    torch.testing.assert_close(seen[0], process.alphas[0] * x0 - 1.1 * process.sigmas[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("process", "prediction_type"), [(VP(), "epsilon"), (Flow(shift=3.0), "flow_prediction")])
def test_nearest_end_is_teachers_step(process, prediction_type):
    """With m = s the target is z_s for any target network."""
    target, seen = Scale(50.0), []
    nets = denoisers(Scale(0.2), target, Scale(0.3), process=process, prediction_type=prediction_type)
    draws = shares(1 - 2**-24, 0, 12, 24, 48)
    objective = tcd(process, distance=lambda x, y: seen.append(y) or losses.l2(x, y))
    objective.loss(nets, a_batch(), draws)
    t = grid()[draws.index]
    s, z_t = (t - 20).clamp_min(process.t_min), process.jump(a_batch().z0, draws.eps, t)
    teacher = nets.teacher.guided(a_batch().cond, a_batch().uncond, draws.w)
    torch.testing.assert_close(seen[0], solvers.ddim(teacher, z_t, t, s, process=process), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("process", "of_teacher"), [(VP(), Flow(shift=3.0)), (Flow(shift=3.0), VP())])
def test_exact_networks_have_no_loss_on_point_mass(process, of_teacher):
    """The property holds for every end time and prediction type."""
    for prediction_type, share in zip(PREDICTION_TYPES, (0.0, 0.3, 0.6, 0.99), strict=True):
        student = exact(process, prediction_type, mu=0.7, s=0.0)
        teacher = exact(of_teacher, "v_prediction", mu=0.7, s=0.0)
        draws = shares(share, 2, 12, 24, 38)
        assert tcd(process).loss(Networks(student, student, teacher), a_batch(), draws)[0] < 1e-8


def test_diffusion_model_has_loss_at_far_ends():
    """The long jumps of a perfect denoiser leave the trajectory. Its short jumps do not."""
    nets = Networks(*[exact(VP(), "v_prediction")] * 3)
    far, near = (tcd().loss(nets, a_batch(), shares(share, 12, 24, 30, 38))[0] for share in (0.0, 0.99))
    assert near < 1e-6 < 1e-5 < far


def test_student_and_target_take_w():
    online, target = Recorder(0.1), Recorder(0.1)
    draws = shares(0.5)
    tcd().loss(denoisers(online, target, Scale(0.3)), a_batch(), draws)
    assert torch.equal(online.w, draws.w)
    assert torch.equal(target.w, draws.w)


# end times


@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
def test_end_times_are_uniform_up_to_s(process):
    """End times are uniform over the clean end and the grid's points up to s, s included."""
    share = torch.linspace(0, 1, 100_001)[:-1]
    for s in (19, 39, 479, 979):
        ends, counts = tcd(process).end_time(torch.full((100_000,), s), share).unique(return_counts=True)
        assert ends.tolist() == [process.t_min, *range(19, s + 1, 20)]
        assert (counts - 100_000 / len(ends)).abs().max() <= 2


@pytest.mark.parametrize(("process", "timesteps"), [(Flow(), grid(points=1000)), (VP(), full())])
def test_end_times_are_not_above_s(process, timesteps):
    s = torch.arange(process.t_min, 980)
    for share in (0.0, 0.5, 1 - 2**-24):
        ends = tcd(process, timesteps=timesteps).end_time(s, torch.full(s.shape, share))
        assert (ends <= s).all()
        assert (ends >= process.t_min).all()
        assert torch.isin(ends, torch.cat([timesteps, torch.tensor([process.t_min])])).all()


def test_end_time_at_clean_end_is_clean_end():
    for process in (VP(), Flow()):
        s = torch.full((3,), process.t_min)
        assert torch.equal(tcd(process).end_time(s, torch.tensor([0.0, 0.5, 1 - 2**-24])), s)


def test_draws_extend_those_of_lcm():
    """Runs of LCM and TCD have the same noise, timesteps and w."""
    options = {"w_min": 2.0, "w_max": 14.0}
    lcd = LatentConsistencyDistillation(VP(), timesteps=grid(), solver=solvers.ddim, distance=losses.l2, **options)
    ours, plain = tcd(**options).draw(torch.zeros(SHAPE), rng()), lcd.draw(torch.zeros(SHAPE), rng())
    for name in ("eps", "index", "w"):
        assert torch.equal(getattr(ours, name), getattr(plain, name))
    assert ours.share.shape == (B,)


def test_draws_cover_the_end_times():
    draws = tcd().draw(torch.zeros(10_000, 1, 1, 1), rng())
    assert 0 <= draws.share.min() < 0.01
    assert 0.99 < draws.share.max() < 1
    assert draws.share.mean().item() == pytest.approx(0.5, abs=0.02)
    ends = tcd().end_time(torch.full((10_000,), 979), draws.share)
    assert ends.unique().tolist() == [0, *range(19, 980, 20)]


# saved students


def test_sampler_is_saved():
    assert tcd(gamma=0.2).sampling() == {"sampler": "tcd", "points": 50, "gamma": 0.2}
    assert tcd(timesteps=full()).sampling()["points"] is None


def test_saved_scheduler_uses_trained_grid():
    name, options = tcd(timesteps=grid(points=100)).scheduler("epsilon")
    scheduler = getattr(diffusers, name)(**options)
    assert isinstance(scheduler, diffusers.TCDScheduler)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == consistency_steps(4, points=100)


def test_stochastic_sampler_of_flow_is_refused():
    with pytest.raises(UserError, match=r"no stochastic TCD sampler for flow models: set model.objective.gamma=0"):
        tcd(Flow(), gamma=0.3)


@pytest.mark.parametrize(("shift", "steps"), [(3.0, 1), (6.0, 8)])
def test_saved_scheduler_of_flow_uses_our_grid(shift, steps):
    """The default grid of diffusers' scheduler is `trailing_steps(steps)` of the process."""
    flow = Flow(shift=shift)
    name, options = tcd(flow, saved_steps=steps).scheduler("flow_prediction")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    expected = flow.sigma(torch.tensor(trailing_steps(steps)))
    torch.testing.assert_close(scheduler.sigmas[:-1], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps, 1000 * expected, rtol=0, atol=1e-3)
