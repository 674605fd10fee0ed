"""The losses of the methods, in closed form."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from lcm.core import losses, solvers
from lcm.core.batch import LatentBatch
from lcm.core.consistency import boundary_scalings
from lcm.core.denoiser import PREDICTION_TYPES, Denoiser
from lcm.core.objectives.consistency import ConsistencyDraws, ConsistencyObjective, Networks
from lcm.core.objectives.denoising import Denoising, DenoisingDraws, min_snr_weight
from lcm.core.objectives.distillation import LatentConsistencyDistillation
from lcm.core.objectives.finetuning import LatentConsistencyFinetuning
from lcm.core.objectives.tcd import TrajectoryConsistencyDistillation, TrajectoryDraws
from lcm.core.process import VP, Flow
from lcm.core.timesteps import grid
from tests.core.gaussian import Gaussian, exact, network

B, SHAPE = 4, (4, 4, 8, 8)
every_process = pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def a_batch(z0=None, cond=0.0, uncond=0.0):
    z0 = torch.randn(SHAPE, generator=rng(1)) if z0 is None else z0
    n = len(z0)
    cond, uncond = {"states": torch.full((n, 1, 1), cond)}, {"states": torch.full((1, 1, 1), uncond)}
    return LatentBatch(z0, cond, uncond, ["caption"] * n, ["key"] * n)


def some_draws(*index):
    index = torch.tensor(index or (0, 12, 24, 49))
    return ConsistencyDraws(torch.randn(SHAPE, generator=rng(2)), index, torch.linspace(2, 14, B))


def denoisers(*networks, process=None, prediction_type="epsilon"):
    """Return the student, its target and the teacher, all with one process."""
    return Networks(*(Denoiser(net, process or VP(), prediction_type) for net in networks))


class Recorder:
    """A network that returns a constant and records its inputs."""

    def __init__(self, value):
        self.value = value

    def __call__(self, z, t, cond, w):
        self.z, self.t, self.w = z, t, w
        return torch.full_like(z, self.value)


class Scale(nn.Module):
    """A network of one weight, with dropout."""

    def __init__(self, weight=0.5, dropout=0.0):
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.tensor(weight)), nn.Dropout(dropout)

    def forward(self, z, t, cond, w):
        return self.dropout(self.weight * z)


def returns_caption(z, t, cond, w):
    return cond["states"].view(-1, 1, 1, 1).expand_as(z)


# one step of distillation: peers' scalar example, student eps -1.1, target eps -0.9, teacher eps -1.0 and -0.8 (null), w = 7

STEPS = pytest.mark.parametrize(
    ("index", "t", "s", "z_t", "z_prev", "student", "target", "l2", "huber"),
    [
        (0, 19, 0, 0.335639106, 0.591088258, 0.486555572, 0.591088258, 0.010927082, 0.103537469),
        (24, 499, 479, -0.756408396, -0.655421806, 0.338711371, 0.171676554, 0.027900630, 0.166037811),
        (49, 999, 979, -1.163068219, -1.005903610, -0.961464125, -1.411911775, 0.202903086, 0.449448760),
    ],
)


def golden_step(index, distance):
    online, target = Recorder(-1.1), Recorder(-0.9)
    objective = LatentConsistencyDistillation(VP(), timesteps=grid(), solver=solvers.ddim, distance=distance)
    loss, logs = objective.loss(
        denoisers(online, target, returns_caption),
        a_batch(torch.full((1, 1, 1, 1), 0.5), cond=-1.0, uncond=-0.8),
        ConsistencyDraws(torch.full((1, 1, 1, 1), -1.2), torch.tensor([index]), torch.tensor([7.0])),
    )
    return Networks(online, target), loss.item(), logs


@STEPS
def test_golden_distillation(index, t, s, z_t, z_prev, student, target, l2, huber):
    points = []
    nets, loss, logs = golden_step(index, lambda x, y: points.extend((x.item(), y.item())) or losses.l2(x, y))
    assert (nets.online.t.item(), nets.target.t.item()) == (t, s)
    assert nets.online.z.item() == pytest.approx(z_t, abs=1e-6)
    assert nets.target.z.item() == pytest.approx(z_prev, abs=2e-6)
    assert (nets.online.w.item(), nets.target.w.item()) == (7, 7)
    assert points == pytest.approx([student, target], abs=1e-5)
    assert loss == pytest.approx(l2, abs=1e-5)
    assert logs["consistency_l2"].item() == pytest.approx(l2, abs=1e-5)
    assert golden_step(index, partial(losses.huber, c=1e-3))[1] == pytest.approx(huber, abs=1e-5)


def distil(nets, draws, process=None, **changes):
    options = {"timesteps": grid(), "solver": solvers.ddim, "distance": losses.l2, **changes}
    return LatentConsistencyDistillation(process or VP(), **options).loss(nets, a_batch(), draws)


def finetune(nets, draws, process=None, **changes):
    options = {"timesteps": grid(), "distance": losses.l2, **changes}
    return LatentConsistencyFinetuning(process or VP(), **options).loss(nets, a_batch(), draws)


def trajectory(nets, draws, process=None, **changes):
    options = {"timesteps": grid(), "solver": solvers.ddim, "distance": losses.l2, **changes}
    draws = TrajectoryDraws(draws.eps, draws.index, draws.w, torch.full((B,), 0.5))
    return TrajectoryConsistencyDistillation(process or VP(), **options).loss(nets, a_batch(), draws)


every_objective = pytest.mark.parametrize("objective", [distil, finetune, trajectory])


@every_objective
def test_gradient_reaches_online_network_only(objective):
    online, target, teacher = Scale(0.5), Scale(0.4), Scale(0.3)
    loss, logs = objective(denoisers(online, target, teacher), some_draws())
    loss.backward()
    assert online.weight.grad.abs() > 0
    assert target.weight.grad is None
    assert teacher.weight.grad is None
    assert not logs["consistency_l2"].requires_grad


@pytest.mark.parametrize("objective", [distil, trajectory])
def test_teacher_builds_no_graph(objective):
    grad_enabled = []

    def teacher(z, t, cond, w):
        grad_enabled.append(torch.is_grad_enabled())
        return z

    objective(denoisers(Scale(0.5), Scale(0.4), teacher), some_draws())
    assert grad_enabled == [False]


@pytest.mark.parametrize("objective", [distil, trajectory])
def test_network_may_be_its_own_target(objective):
    """The gradient is that of the student's point alone."""
    net = Scale(0.5)
    objective(denoisers(net, net, Scale(0.3)), some_draws())[0].backward()
    apart = Scale(0.5)
    objective(denoisers(apart, Scale(0.5), Scale(0.3)), some_draws())[0].backward()
    assert torch.equal(net.weight.grad, apart.weight.grad)


@every_objective
def test_skip_steps(objective):
    target = Recorder(0.1)
    for skip_steps in (1, 20, 100):
        objective(denoisers(Recorder(0.1), target, Recorder(0.1)), some_draws(), skip_steps=skip_steps)
        assert target.t.tolist() == [max(t - skip_steps, 0) for t in (19, 259, 499, 999)]


def test_loss_is_the_mean_over_samples():
    nets, draws = denoisers(Scale(0.5), Scale(0.4), Scale(0.3)), some_draws()
    each = []
    distil(nets, draws, distance=lambda x, y: each.append(losses.l2(x, y)) or each[0])
    torch.testing.assert_close(distil(nets, draws)[0], each[0].mean())


def test_finetuning_uses_same_eps_twice():
    online, target, draws = Recorder(0.1), Recorder(0.1), some_draws()
    finetune(denoisers(online, target), draws)
    for net in (online, target):
        torch.testing.assert_close(net.z, VP().jump(a_batch().z0, draws.eps, net.t))


def test_finetuning_of_perfect_network():
    """With x0 = z0, f differs between the points by c_skip (z - z0) only, which is near 0 except at s = 0."""
    draws, z0 = some_draws(1, 12, 24, 49), a_batch().z0
    perfect = denoisers(*[lambda z, t, cond, w: z0] * 2, prediction_type="sample")
    assert finetune(perfect, draws)[0] < 1e-9
    at_boundary = finetune(perfect, some_draws(0, 0, 0, 0))[0]
    z_0 = VP().jump(z0, draws.eps, torch.zeros(B, dtype=torch.int64))
    torch.testing.assert_close(at_boundary, (z_0 - z0).square().mean(), rtol=1e-3, atol=0)


def test_distillation_on_point_mass():
    """The teacher's step stays on the trajectory, so a perfect student has no loss."""
    perfect = [lambda z, t, cond, w: torch.full_like(z, 0.7)] * 3
    assert distil(denoisers(*perfect, prediction_type="sample"), some_draws(1, 12, 24, 49))[0] < 1e-9


PROCESSES = {"vp": VP(), "flow_3": Flow(shift=3.0)}
WITHIN = (2, 12, 24, 38)  # grid points whose noise levels Stable Diffusion's process has as well
PAIRS = [("vp", "flow_3"), ("flow_3", "vp")]
every_pair = pytest.mark.parametrize(("of_teacher", "of_student"), PAIRS)


@every_pair
def test_types_and_processes_agree_on_point_mass(of_teacher, of_student):
    """Teacher and student may differ in prediction type and process."""
    theirs, ours = PROCESSES[of_teacher], PROCESSES[of_student]
    for teacher_type, student_type in product(PREDICTION_TYPES, PREDICTION_TYPES):
        teacher, student = exact(theirs, teacher_type, mu=0.7, s=0.0), exact(ours, student_type, mu=0.7, s=0.0)
        assert distil(Networks(student, student, teacher), some_draws(*WITHIN), ours)[0] < 1e-8


@every_pair
def test_types_and_processes_agree_on_gaussian(of_teacher, of_student):
    """A perfect consistency function, the end of the teacher's trajectory, has no loss. A perfect denoiser has one."""
    theirs, ours = PROCESSES[of_teacher], PROCESSES[of_student]
    data, draws = Gaussian(ours), some_draws(*WITHIN)
    for teacher_type, student_type in product(PREDICTION_TYPES, PREDICTION_TYPES):
        teacher = exact(theirs, teacher_type)
        perfect, denoiser = network(ours, student_type, data.end), exact(ours, student_type)
        options = {"process": ours, "solver": solvers.dpm_solver_pp_2}
        assert distil(Networks(perfect, perfect, teacher), draws, **options)[0] < 1e-6
        assert distil(Networks(denoiser, denoiser, teacher), draws, **options)[0] > 1e-4


def test_golden_distillation_in_flow():
    """sigma 0.75 -> 0.70, and `f = y - sigma u`: teacher u -1.6 and -1.4 (null), w = 4, student u -1.9, target u -1.5."""
    flow, seen, online, target = Flow(num_train_timesteps=20), [], Recorder(-1.9), Recorder(-1.5)
    objective = LatentConsistencyDistillation(
        flow,
        timesteps=grid(20, points=20),
        solver=solvers.ddim,
        skip_steps=1,
        distance=lambda x, y: seen.extend((x.item(), y.item())) or losses.l2(x, y),
    )
    loss, _ = objective.loss(
        denoisers(online, target, returns_caption, process=flow, prediction_type="flow_prediction"),
        a_batch(torch.full((1, 1, 1, 1), 0.5), cond=-1.6, uncond=-1.4),
        ConsistencyDraws(torch.full((1, 1, 1, 1), -1.2), torch.tensor([14]), torch.tensor([4.0])),
    )
    assert (online.t.item(), target.t.item()) == pytest.approx((750, 700))
    assert (online.z.item(), target.z.item()) == pytest.approx((-0.775, -0.655), abs=1e-6)
    assert seen == pytest.approx([0.650, 0.395], abs=1e-6)
    assert loss.item() == pytest.approx(0.065025, abs=1e-6)


def test_target_at_boundary_of_flow_is_teachers_point():
    """At s = -1 the target is z_s for any target network."""
    flow, seen, options = Flow(), [], {"process": Flow(), "prediction_type": "flow_prediction"}
    for value in (-3.0, 50.0):
        nets = denoisers(Scale(0.2), Recorder(value), Scale(0.3), **options)
        distil(nets, some_draws(0, 0, 0, 0), flow, distance=lambda x, y: seen.append(y) or losses.l2(x, y))
    assert torch.equal(*seen)


def test_both_points_share_dropout_masks():
    """Equal networks at equal points have no loss in training mode."""
    online, target = Scale(dropout=0.5).train(), Scale(dropout=0.5).train()
    z, t = torch.randn(SHAPE, generator=rng()), torch.full((B,), 499)
    assert not torch.equal(online(z, t, None, None), online(z, t, None, None))
    objective = ConsistencyObjective(VP(), timesteps=grid(), distance=losses.l1)
    loss, _ = objective.distances(objective.compare(denoisers(online, target), {}, torch.zeros(B), (z, t), (z, t)))
    assert loss == 0


def test_target_at_boundary_is_teachers_point():
    """At s = 0 the target is z_s for any target network."""
    first, second = (distil(denoisers(Recorder(0.1), Recorder(x), Scale(0.3)), some_draws(0, 0, 0, 0))[0] for x in (-3.0, 50.0))
    assert first == second


# draws


def drawn(w_min, w_max):
    return ConsistencyObjective(VP(), timesteps=grid(), distance=losses.l2, w_min=w_min, w_max=w_max)


def draw(seed=0, z0=None):
    return drawn(2.0, 14.0).draw(torch.zeros(SHAPE) if z0 is None else z0, rng(seed))


def test_consistency_draws_depend_on_generator():
    for name in ("eps", "index", "w"):
        assert torch.equal(getattr(draw(0), name), getattr(draw(0), name))
        assert not torch.equal(getattr(draw(0), name), getattr(draw(1), name))


def test_consistency_draws_fill_their_ranges():
    draws = draw(z0=torch.zeros(10000, 1, 1, 1))
    assert draws.index.unique().tolist() == list(range(50))
    assert 2 <= draws.w.min() < 2.01
    assert 13.99 < draws.w.max() <= 14
    assert (draws.eps.mean().item(), draws.eps.std().item()) == pytest.approx((0, 1), abs=0.03)


def test_fixed_w():
    assert (drawn(7.5, 7.5).draw(torch.zeros(SHAPE), rng()).w == 7.5).all()


def test_denoising_draws_depend_on_generator():
    first, second = (Denoising(VP(), offset_noise=0.1).draw(torch.zeros(SHAPE), rng()) for _ in range(2))
    assert torch.equal(first.eps, second.eps)
    assert torch.equal(first.t, second.t)


def test_denoising_draws_fill_their_range():
    t = Denoising(VP()).draw(torch.zeros(20000, 1, 1, 1), rng()).t
    assert t.unique().tolist() == list(range(1000))


def test_offset_noise_shifts_channel_means():
    plain, offset = (Denoising(VP(), offset_noise=x).draw(torch.zeros(SHAPE), rng()).eps for x in (0.0, 0.1))
    shift = offset - plain
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-6)
    assert shift[..., 0, 0].std().item() == pytest.approx(0.1, rel=0.5)


def test_offset_noise_in_training_only():
    plain, offset = (Denoising(VP(), offset_noise=x).eval().draw(torch.zeros(SHAPE), rng()) for x in (0.0, 0.1))
    assert torch.equal(plain.eps, offset.eps)
    assert torch.equal(plain.t, offset.t)


# denoising

Z0, EPS = a_batch().z0, torch.randn(SHAPE, generator=rng(3))
TIMES = torch.tensor([0, 259, 499, 999])


def denoising_loss(prediction_type, x0_error, min_snr_gamma=None, t=TIMES, process=None):
    """Return the loss of a network whose x0 has the error x0_error everywhere."""
    process = process or VP()
    alpha, sigma = process.at(t, 4)

    def net(z, time, cond, w):
        assert w is None
        return denoiser.target(Z0 + x0_error, EPS - x0_error * alpha / sigma, t)

    denoiser = Denoiser(net, process, prediction_type)
    return Denoising(process, min_snr_gamma=min_snr_gamma).loss(denoiser, a_batch(), DenoisingDraws(EPS, t))[0]


@every_type
def test_denoising_loss_is_quadratic(prediction_type):
    assert denoising_loss(prediction_type, 0.0) == 0
    once, twice = (denoising_loss(prediction_type, x0_error) for x0_error in (0.1, 0.2))
    torch.testing.assert_close(twice, 4 * once, rtol=1e-4, atol=0)


def test_golden_denoising_loss():
    assert denoising_loss("sample", 0.1).item() == pytest.approx(0.01, rel=1e-4)


@every_process
def test_min_snr_weights_error_of_x0(process):
    """The loss is min(SNR, gamma) times x0's squared error for every prediction type (2303.09556)."""
    times = TIMES if isinstance(process, VP) else TIMES[:-1]  # z_t is eps in a flow at 999
    for t, gamma, prediction_type in product(times, (1.0, 5.0), PREDICTION_TYPES):
        t = t.expand(B)
        snr = (process.alpha(t) / process.sigma(t))[0].item() ** 2
        loss = denoising_loss(prediction_type, 0.1, gamma, t, process).item()
        assert loss == pytest.approx(min(snr, gamma) * 0.01, rel=1e-3)


@pytest.mark.parametrize("process", [VP(rescale_betas_zero_snr=True), Flow()], ids=["zero_snr", "flow"])
def test_min_snr_weights_are_finite(process):
    for prediction_type in PREDICTION_TYPES:
        weight = min_snr_weight(Denoiser(None, process, prediction_type), torch.arange(1000), 5.0)
        assert weight.isfinite().all()
        assert (weight >= 0).all()


def test_each_sample_has_scalings_of_its_t():
    """The student's f at t is c_skip z + c_out x0."""
    online, seen = Recorder(0.3), []
    nets = denoisers(online, Recorder(0.3), Recorder(0.3), prediction_type="sample")
    distil(nets, some_draws(), distance=lambda x, y: seen.append(x) or losses.l2(x, y))
    c_skip, c_out = (c.view(B, 1, 1, 1) for c in boundary_scalings(online.t))
    torch.testing.assert_close(seen[0], c_skip * online.z + c_out * 0.3)
