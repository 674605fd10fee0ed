"""Consistency models and guided distillation, in closed form."""

import pytest
import torch

from lcm.core import losses, solvers
from lcm.core.consistency import cm_consistency_fn
from lcm.core.denoiser import PREDICTION_TYPES, Denoiser
from lcm.core.objectives.consistency import Networks
from lcm.core.objectives.consistency_models import ConsistencyDistillation, ConsistencyTraining
from lcm.core.objectives.guided_distillation import halve_steps, match_guided_teacher
from lcm.core.process import VP, Flow
from lcm.core.timesteps import karras, trailing_steps
from tests.core.gaussian import Gaussian, exact, network, timestep
from tests.core.test_objectives import Recorder, Scale, a_batch, denoisers, some_draws

PROCESS = VP()
GRID = karras(PROCESS, points=18)[1:]
every_process = pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])


def distil(nets, draws, process=PROCESS, solver=solvers.heun, points=18):
    objective = ConsistencyDistillation(process, points=points, solver=solver, distance=losses.l2)
    return objective.loss(nets, a_batch(), draws)


def train(nets, draws, process=PROCESS, points=18):
    return ConsistencyTraining(process, points=points, distance=losses.l2).loss(nets, a_batch(), draws)


both = pytest.mark.parametrize("objective", [distil, train], ids=["distillation", "training"])


def sample(*networks):
    """Return denoisers of VP that predict x0."""
    return denoisers(*networks, prediction_type="sample")


def eight_steps(process):
    """Return the timesteps of eight steps, to be halved."""
    return torch.tensor([*trailing_steps(8), process.t_min])


@both
def test_pair_is_two_neighbours(objective):
    online, target = Recorder(0.1), Recorder(0.1)
    objective(sample(online, target, Recorder(0.1)), some_draws(0, 1, 8, 16))
    assert online.t.tolist() == GRID[[0, 1, 8, 16]].tolist()
    assert target.t.tolist() == [0, *GRID[[0, 7, 15]].tolist()]


@both
def test_consistency_models_take_no_w(objective):
    online, target = Recorder(0.1), Recorder(0.1)
    objective(sample(online, target, Recorder(0.1)), some_draws(0, 1, 8, 16))
    assert online.w is None
    assert target.w is None


@both
def test_gradient_reaches_online_network_only(objective):
    online, target, teacher = Scale(0.5), Scale(0.4), Scale(0.3)
    objective(sample(online, target, teacher), some_draws(1, 5, 8, 16))[0].backward()
    assert online.weight.grad.abs() > 0
    assert target.weight.grad is None
    assert teacher.weight.grad is None


def test_teacher_is_called_without_guidance():
    teacher = Recorder(0.1)
    distil(sample(Scale(), Scale(), teacher), some_draws(0, 1, 8, 16), solver=solvers.ddim)
    assert len(teacher.z) == 4


def test_near_point_of_distillation_is_on_trajectory():
    online, target, draws = Recorder(0.1), Recorder(0.1), some_draws(4, 8, 12, 16)
    distil(Networks(*sample(online, target)[:2], exact(PROCESS, "sample")), draws)
    z_t, t, s = online.z, online.t, target.t
    torch.testing.assert_close(target.z, Gaussian(PROCESS).flow(z_t, t, s), rtol=0.02, atol=0.02)


def test_near_point_of_training_has_same_eps():
    online, target, draws = Recorder(0.1), Recorder(0.1), some_draws(4, 8, 12, 16)
    train(sample(online, target), draws)
    for net in (online, target):
        torch.testing.assert_close(net.z, PROCESS.jump(a_batch().z0, draws.eps, net.t))


def test_true_consistency_function_has_no_loss():
    """The network's x0 is chosen so that f is the Gaussian's exact flow to t_min."""
    gaussian, draws = Gaussian(PROCESS), some_draws(4, 8, 12, 16)
    reader = Denoiser(None, PROCESS, "sample")

    def net(z, t, cond, w=None):
        end = gaussian.flow(z, t, torch.zeros_like(t)) / PROCESS.alphas[0]
        zero, one = (reader.read(torch.full_like(z, x0), z, t) for x0 in (0.0, 1.0))  # f is affine in x0
        at_0, at_1 = (cm_consistency_fn(lambda z, t, d=d: d, z, t, process=PROCESS) for d in (zero, one))
        return (end - at_0) / (at_1 - at_0)

    perfect, teacher = Denoiser(net, PROCESS, "sample"), exact(PROCESS, "sample")
    loss, _ = distil(Networks(perfect, perfect, teacher), draws)
    wrong, _ = distil(Networks(teacher, teacher, teacher), draws)
    assert loss < 0.02 * wrong


@pytest.mark.parametrize(
    ("prediction_type", "process"),
    [("v_prediction", Flow(shift=3.0)), ("sample", VP())],
)
def test_true_consistency_function_of_flow_has_no_loss(prediction_type, process):
    """The perfect student's x0 is the end of the trajectory. The teacher may have another process.

    The loss is finite from pure noise.
    """
    flow, points = Flow(), 60
    grid = karras(flow, points=points)[1:]
    draws = some_draws(*[(grid - t).abs().argmin().item() for t in (60, 200, 500, 850)])
    perfect, teacher = network(flow, prediction_type, Gaussian(flow).end), exact(process, prediction_type)
    denoiser = exact(flow, prediction_type)
    loss, _ = distil(Networks(perfect, perfect, teacher), draws, flow, points=points)
    wrong, _ = distil(Networks(denoiser, denoiser, teacher), draws, flow, points=points)
    assert loss < 0.02 * wrong
    ends = some_draws(0, 0, len(grid) - 1, len(grid) - 1)
    for objective in (distil, train):
        assert objective(Networks(denoiser, denoiser, denoiser), ends, flow, points=points)[0].isfinite()


# guided distillation


def guided_network(teacher, batch):
    """Return a w-conditioned denoiser with the outputs of the guided teacher."""
    process = teacher.process

    def net(z, time, cond, w):
        t = timestep(process, time)
        return teacher.target(*teacher.guided(batch.cond, batch.uncond, w)(z, t), t)

    return Denoiser(net, process, teacher.prediction_type)


def captioned(z, t, cond, w=None):
    """A teacher that depends on its caption."""
    return 0.3 * z + cond["states"].view(-1, 1, 1, 1)


@every_process
def test_guided_teacher_has_no_matching_loss(process):
    batch, draws = a_batch(cond=0.4), some_draws(0, 250, 700, 999 if isinstance(process, VP) else 989)
    for prediction_type in PREDICTION_TYPES:
        teacher = Denoiser(captioned, process, prediction_type)
        loss, _ = match_guided_teacher(guided_network(teacher, batch), teacher, batch, draws)
        unguided, _ = match_guided_teacher(teacher, teacher, batch, draws)
        assert loss < 1e-4 * unguided


def test_teacher_of_another_process_has_no_matching_loss():
    batch, draws = a_batch(cond=0.4), some_draws(100, 250, 500, 800)
    student, teacher = exact(Flow(), "flow_prediction"), exact(PROCESS, "v_prediction")
    assert match_guided_teacher(student, teacher, batch, draws)[0] < 1e-6
    assert match_guided_teacher(student, exact(PROCESS, "v_prediction", mu=0.31), batch, draws)[0] > 1e-5


def test_matching_loss_has_truncated_snr_weight():
    """The loss is `max(alpha^2 / sigma^2, 1)` times the squared error of x0."""
    student, teacher = sample(Recorder(0.4), Recorder(0.5))[:2]
    for t, weight in ((0, 1175.4), (250, 1.8155), (999, 1.0)):
        weight = max((PROCESS.alphas[t] / PROCESS.sigmas[t]).item() ** 2, 1.0) if t != 0 else weight
        loss, logs = match_guided_teacher(student, teacher, a_batch(), some_draws(*[t] * 4))
        assert loss.item() == pytest.approx(weight * 0.01, rel=1e-3)
        assert logs["x0_l2"].item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("process", "prediction_type"),  # in a flow's pure noise eps does not determine x0
    [(VP(), "epsilon"), (Flow(), "flow_prediction")],
)
def test_one_step_of_student_matches_two_of_previous(process, prediction_type):
    """The loss is 0 for the x0 whose one DDIM step ends where two steps of the previous student end."""
    timesteps, draws = eight_steps(process), some_draws(0, 1, 2, 3)
    previous, steps = exact(process, prediction_type, s=0.3), []

    def answers(z, time, cond, w):
        """Return the x0 of two steps, derived from the update `z_s = alpha_s x0 + sigma_s eps`."""
        t, middle, s = (timesteps[2 * draws.index + i] for i in (0, 1, 2))
        denoise = previous.bound(cond)
        z_s = solvers.ddim(denoise, solvers.ddim(denoise, z, t, middle, process=process), middle, s, process=process)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t, 4), process.at(s, 4)
        x0 = (sigma_t * z_s - sigma_s * z) / (alpha_s * sigma_t - alpha_t * sigma_s)
        steps.append((timestep(process, time).round().long(), s))
        return previous.target(x0, (z - alpha_t * x0) / sigma_t, t)

    student = Denoiser(answers, process, prediction_type)
    loss, _ = halve_steps(student, previous, a_batch(), draws, timesteps=timesteps)
    other, _ = halve_steps(previous, previous, a_batch(), draws, timesteps=timesteps)
    assert loss < 1e-5 < 1e-3 < other
    [(t, s)] = steps
    assert t.tolist() == timesteps[:-1:2].tolist() == trailing_steps(4)
    assert s.tolist() == [*trailing_steps(4)[1:], process.t_min]


def test_halving_has_no_loss_on_point_mass():
    perfect = Denoiser(lambda z, t, cond, w: torch.full_like(z, 0.7), PROCESS, "sample")
    loss, _ = halve_steps(perfect, perfect, a_batch(), some_draws(0, 1, 2, 3), timesteps=eight_steps(PROCESS))
    assert loss < 1e-7


def test_both_stages_pass_w_and_build_no_target_graph():
    student, other, draws = Scale(0.5), Scale(0.4), some_draws(0, 1, 2, 3)
    seen = []

    def previous(z, t, cond, w):
        seen.append((torch.is_grad_enabled(), w))
        return other(z, t, cond, w)

    online, before, teacher, *_ = sample(student, previous, other)
    halve_steps(online, before, a_batch(), draws, timesteps=eight_steps(PROCESS))[0].backward()
    match_guided_teacher(online, teacher, a_batch(), draws)[0].backward()
    assert [grad for grad, _ in seen] == [False, False]
    assert all(torch.equal(w, draws.w) for _, w in seen)
    assert other.weight.grad is None
    assert student.weight.grad.abs() > 0
