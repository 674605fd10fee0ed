"""The older methods of the paper's table: consistency models and guided distillation, in closed form."""

from functools import partial

import pytest
import torch

from lcm.core import losses, solvers
from lcm.core.consistency import cm_consistency_fn
from lcm.core.networks import Networks, guided
from lcm.core.objectives.consistency_models import consistency_distillation, consistency_training
from lcm.core.objectives.guided_distillation import halve_steps, match_guided_teacher
from lcm.core.prediction import PREDICTION_TYPES
from lcm.core.schedule import NoiseSchedule
from lcm.core.timesteps import karras, trailing_steps
from tests.core.gaussian import Gaussian
from tests.core.test_objectives import Recorder, Scale, a_batch, some_draws

SCHEDULE = NoiseSchedule(prediction_type="sample")
GRID = karras(SCHEDULE, points=18)[1:]
PASSED = torch.tensor([*trailing_steps(8), 0])  # by eight steps, which become four
every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def cm(objective, nets, draws, schedule=SCHEDULE, distance=losses.l2, **options):
    f = partial(cm_consistency_fn, schedule=schedule)
    return objective(nets, a_batch(), draws, schedule=schedule, timesteps=GRID, distance=distance, f=f, **options)


distil = partial(cm, consistency_distillation, solver=solvers.heun)
train = partial(cm, consistency_training)
both = pytest.mark.parametrize("objective", [distil, train], ids=["distillation", "training"])


def exact(schedule, **options):
    """A network that knows the Gaussian its data comes from, in the schedule's prediction type."""
    gaussian = Gaussian(schedule, **options)

    def net(z, t, cond, w=None):
        x0, eps = gaussian.denoise(z, t)
        return schedule.target(x0, eps, t)

    return net


@both
def test_the_pair_is_two_neighbours_of_the_grid(objective):
    nets = Networks(Recorder(0.1), Recorder(0.1), Recorder(0.1))
    objective(nets, some_draws(0, 1, 8, 16))
    assert nets.online.t.tolist() == GRID[[0, 1, 8, 16]].tolist()
    assert nets.target.t.tolist() == [0, *GRID[[0, 7, 15]].tolist()]


@both
def test_consistency_models_know_no_w(objective):
    nets = Networks(Recorder(0.1), Recorder(0.1), Recorder(0.1))
    objective(nets, some_draws(0, 1, 8, 16))
    assert nets.online.w is None
    assert nets.target.w is None


@both
def test_only_the_online_network_learns(objective):
    nets = Networks(Scale(0.5), Scale(0.4), Scale(0.3))
    objective(nets, some_draws(1, 5, 8, 16))[0].backward()
    assert nets.online.weight.grad.abs() > 0
    assert nets.target.weight.grad is None
    assert nets.teacher.weight.grad is None


def test_the_teacher_is_asked_without_guidance():
    teacher = Recorder(0.1)
    cm(consistency_distillation, Networks(Scale(), Scale(), teacher), some_draws(0, 1, 8, 16), solver=solvers.euler)
    assert len(teacher.z) == 4


def test_distillation_s_near_point_lies_on_the_teacher_s_path():
    nets, draws = Networks(Recorder(0.1), Recorder(0.1), exact(SCHEDULE)), some_draws(4, 8, 12, 16)
    distil(nets, draws)
    z_t, t, s = nets.online.z, nets.online.t, nets.target.t
    torch.testing.assert_close(nets.target.z, Gaussian(SCHEDULE).flow(z_t, t, s), rtol=0.02, atol=0.02)


def test_training_s_near_point_has_the_same_noise():
    nets, draws = Networks(Recorder(0.1), Recorder(0.1)), some_draws(4, 8, 12, 16)
    train(nets, draws)
    for net in (nets.online, nets.target):
        torch.testing.assert_close(net.z, SCHEDULE.add_noise(a_batch().z0, draws.eps, net.t))


def test_the_true_consistency_function_has_no_loss():
    """That of a Gaussian: the flow to t_min; as a network, it is whatever makes f give that."""
    gaussian, draws = Gaussian(SCHEDULE), some_draws(4, 8, 12, 16)

    def net(z, t, cond, w=None):
        end = gaussian.flow(z, t, torch.zeros_like(t)) / SCHEDULE.alpha[0]
        zero, one = (SCHEDULE.denoised(torch.full_like(z, x0), z, t) for x0 in (0.0, 1.0))  # f is affine in x0
        at_0, at_1 = (cm_consistency_fn(lambda z, t, d=d: d, z, t, schedule=SCHEDULE) for d in (zero, one))
        return (end - at_0) / (at_1 - at_0)

    loss, _ = distil(Networks(net, net, exact(SCHEDULE)), draws)
    wrong, _ = distil(Networks(exact(SCHEDULE), exact(SCHEDULE), exact(SCHEDULE)), draws)
    assert loss < 0.02 * wrong


# guided distillation


class Guided:
    """A w-conditioned network that answers as the guided teacher does."""

    def __init__(self, teacher, batch, schedule):
        self.teacher, self.batch, self.schedule = teacher, batch, schedule

    def __call__(self, z, t, cond, w):
        x0, eps = guided(self.teacher, self.batch.cond, self.batch.uncond, self.schedule, w)(z, t)
        return self.schedule.target(x0, eps, t)


def captioned(z, t, cond, w=None):
    """A teacher that listens to its caption."""
    return 0.3 * z + cond.view(-1, 1, 1, 1)


@every_type
def test_the_guided_teacher_itself_has_no_matching_loss(prediction_type):
    schedule, batch, draws = NoiseSchedule(prediction_type=prediction_type), a_batch(cond=0.4), some_draws(0, 250, 700, 999)
    loss, _ = match_guided_teacher(Guided(captioned, batch, schedule), captioned, batch, draws, schedule=schedule)
    unguided, _ = match_guided_teacher(captioned, captioned, batch, draws, schedule=schedule)
    assert loss < 1e-4 * unguided


def test_matching_is_weighted_by_the_truncated_snr():
    """`max(alpha^2 / sigma^2, 1)` times x0's squared error."""
    teacher, student = Recorder(0.5), Recorder(0.4)
    for t, weight in ((0, 1175.4), (250, 1.8155), (999, 1.0)):
        weight = max((SCHEDULE.alpha[t] / SCHEDULE.sigma[t]).item() ** 2, 1.0) if t != 0 else weight
        loss, logs = match_guided_teacher(student, teacher, a_batch(), some_draws(*[t] * 4), schedule=SCHEDULE)
        assert loss.item() == pytest.approx(weight * 0.01, rel=1e-3)
        assert logs["x0_l2"].item() == pytest.approx(0.01, rel=1e-4)


@every_type
def test_one_step_of_the_student_s_target_is_two_of_the_previous(prediction_type):
    """The loss's minimum: x0 whose one DDIM step from z_t arrives where two steps did."""
    schedule, draws = NoiseSchedule(prediction_type=prediction_type), some_draws(0, 1, 2, 3)
    previous, steps = exact(schedule, s=0.3), []

    def student(z, t, cond, w):
        """Answers with the x0 of two steps, derived on its own from the update `z_s = alpha_s x0 + sigma_s eps`."""
        middle, s = (PASSED[2 * draws.index + i] for i in (1, 2))
        denoise = lambda z, t: schedule.denoised(previous(z, t, cond), z, t)  # noqa: E731
        z_s = solvers.ddim(denoise, solvers.ddim(denoise, z, t, middle, schedule=schedule), middle, s, schedule=schedule)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t, 4), schedule.at(s, 4)
        x0 = (sigma_t * z_s - sigma_s * z) / (alpha_s * sigma_t - alpha_t * sigma_s)
        steps.append((t, s))
        return schedule.target(x0, (z - alpha_t * x0) / sigma_t, t)

    loss, _ = halve_steps(student, previous, a_batch(), draws, schedule=schedule, timesteps=PASSED)
    other, _ = halve_steps(previous, previous, a_batch(), draws, schedule=schedule, timesteps=PASSED)
    assert loss < 1e-5 < 1e-3 < other
    [(t, s)] = steps
    assert t.tolist() == PASSED[:-1:2].tolist() == trailing_steps(4)
    assert s.tolist() == [*trailing_steps(4)[1:], 0]


def test_on_a_point_mass_halving_asks_for_what_the_previous_student_knows():
    knows = lambda z, t, cond, w: torch.full_like(z, 0.7)  # noqa: E731
    loss, _ = halve_steps(knows, knows, a_batch(), some_draws(0, 1, 2, 3), schedule=SCHEDULE, timesteps=PASSED)
    assert loss < 1e-7


def test_both_stages_pass_w_on_and_keep_no_graph_of_the_target():
    student, other, draws = Scale(0.5), Scale(0.4), some_draws(0, 1, 2, 3)
    seen = []

    def previous(z, t, cond, w):
        seen.append((torch.is_grad_enabled(), w))
        return other(z, t, cond, w)

    halve_steps(student, previous, a_batch(), draws, schedule=SCHEDULE, timesteps=PASSED)[0].backward()
    match_guided_teacher(student, other, a_batch(), draws, schedule=SCHEDULE)[0].backward()
    assert [grad for grad, _ in seen] == [False, False]
    assert all(torch.equal(w, draws.w) for _, w in seen)
    assert other.weight.grad is None
    assert student.weight.grad.abs() > 0
