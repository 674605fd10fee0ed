"""Distribution matching: losses in closed form, the student's steps, the fake score, and the saved sampler."""

from functools import partial

import diffusers
import pytest
import torch
from torch import nn

from lcm.core import losses, sampling
from lcm.core.denoiser import Denoiser
from lcm.core.objectives.consistency import Networks
from lcm.core.objectives.distribution_matching import (
    ImprovedDistributionMatching,
    MatchingDraws,
    Sample,
    TrajectoryDistributionMatching,
)
from lcm.core.process import VP, Flow
from lcm.core.random import generator
from lcm.core.timesteps import consistency_steps, trailing_steps
from tests.core.gaussian import exact
from tests.core.test_objectives import SHAPE, B, Recorder, Scale, a_batch, rng

every_process = pytest.mark.parametrize("process", [VP(), Flow(shift=3.0)], ids=["vp", "flow_3"])
KINDS = {"tdm": (TrajectoryDistributionMatching, losses.huber), "dmd2": (ImprovedDistributionMatching, losses.l2)}
every_kind = pytest.mark.parametrize("kind", KINDS)
pairs = [("dmd2", VP()), ("tdm", Flow(shift=3.0))]
kind_and_process = pytest.mark.parametrize(("kind", "process"), pairs, ids=["dmd2_vp", "tdm_flow_3"])


def matching(kind, process=None, **options):
    cls, distance = KINDS[kind]
    return cls(process or VP(), **{"distance": distance, **options})


class Constant(nn.Module):
    """A network of one weight, which it returns."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, z, t, cond, w):
        return self.value.expand_as(z)


@pytest.mark.parametrize(
    ("kind", "loss", "gradient"),
    [("dmd2", 1.53125, 1.75), ("tdm", ((0.35**2 + 1e-6) ** 0.5 - 1e-3) / 0.2, 0.35 / (0.35**2 + 1e-6) ** 0.5 / 0.2)],
)
def test_golden_loss(kind, loss, gradient):
    """The student predicts 0.3 and the fake score 0.45. The teacher predicts 0.1 with and without the caption."""
    student, process = Constant(0.3), VP()
    nets = [Denoiser(net, process, "sample") for net in (student, student, Recorder(0.1), Recorder(0.45))]
    objective, one = matching(kind, process), torch.ones(1, 1, 1, 1)
    value, _ = objective.loss(Networks(*nets), a_batch(one), objective.draw(one, rng()))
    assert value.item() == pytest.approx(loss, rel=1e-5)
    value.backward()
    assert student.value.grad.item() == pytest.approx(gradient, rel=1e-4)


@kind_and_process
def test_scores_that_agree_leave_the_student(kind, process):
    student, score = exact(process, "v_prediction", mu=0.9, s=0.1), exact(process, "v_prediction")
    objective = matching(kind, process, w_min=0.0, w_max=5.0)
    draws = objective.draw(a_batch().z0, rng())
    assert objective.loss(Networks(student, student, score, score), a_batch(), draws)[0] < 1e-9


@kind_and_process
def test_student_is_drawn_from_its_own_data_to_the_teachers(kind, process):
    student, teacher = exact(process, "v_prediction", mu=-0.4, s=0.3), exact(process, "v_prediction", mu=0.6, s=0.3)
    objective = matching(kind, process)
    draws = objective.draw(torch.zeros(64, 1, 2, 2), rng())
    pair = objective.pair(Networks(student, student, teacher, student), a_batch(torch.zeros(64, 1, 2, 2)), draws)
    assert (pair.target > pair.online).all()


# the student's steps


class Steps:
    """A network that records all its inputs."""

    def __init__(self):
        self.seen = []

    def __call__(self, z, t, cond, w=None):
        self.seen.append((z, t))
        return 0.4 * z


@pytest.mark.parametrize(("process", "steps"), [(VP(), 4), (Flow(shift=3.0), 2)], ids=str)
def test_inputs_are_those_of_the_sampler(process, steps):
    """Every step of the student has the times of the few-step sampler."""
    times = trailing_steps(steps) if isinstance(process, Flow) else consistency_steps(steps)
    for kind, sampler in (("tdm", partial(sampling.tcd, gamma=0.0)), ("dmd2", sampling.consistency)):
        objective, net = matching(kind, process, steps=steps), Steps()
        draws, student = objective.draw(a_batch().z0, rng()), Denoiser(net, process, "sample")
        noise = iter(draws.noise[:, 1:].unbind(1)).__next__
        sampler(student.bound({}), draws.noise[:, 0], times, process=process, noise=noise)
        inputs = list(net.seen)
        for index in range(steps):
            objective.step, draws.index = index, torch.full((B,), index)
            sample = objective.sample(student, a_batch(), draws)
            (z, t), (wanted, time) = net.seen[-1], inputs[steps - 1 - index]
            torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-4)
            assert torch.equal(t, time)
            assert torch.equal(process.network_time(sample.start), time)


def test_samples_of_tdm_have_steps_of_their_own():
    objective, student = matching("tdm"), Denoiser(Recorder(0.1), VP(), "sample")
    draws = objective.draw(a_batch().z0, rng())
    draws.index = torch.tensor([0, 3, 1, 2])
    sample = objective.sample(student, a_batch(), draws)
    assert sample.start.tolist() == [259, 999, 499, 759]
    assert sample.end.tolist() == [0, 759, 259, 499]
    torch.testing.assert_close(student.net.z[1], draws.noise[1, 0])


def test_gradient_passes_through_the_last_step_only():
    for kind in KINDS:
        objective, net, calls = matching(kind), Scale(0.5), []
        student = Denoiser(lambda *a, net=net, calls=calls: calls.append(torch.is_grad_enabled()) or net(*a), VP(), "sample")
        objective.step = 1
        objective.sample(student, a_batch(), objective.draw(a_batch().z0, rng()))
        assert calls == ([False] * 3 + [True] if kind == "tdm" else [False] * 2 + [True])


def test_one_number_chooses_the_step_of_all_ranks():
    objective, chosen = matching("dmd2"), []
    for batch in range(200):
        objective.draw_shared_step(generator("cpu", 0, "train", batch, "shared"))
        chosen.append(objective.step)
    assert set(chosen) == {0, 1, 2, 3}
    objective.draw_shared_step(generator("cpu", 0, "train", 7, "shared"))
    assert objective.step == chosen[7]


# the scores


@every_process
def test_scores_are_compared_within_the_step_or_anywhere(process):
    count = 4000
    x0, share = torch.zeros(count, 1, 1, 1), torch.linspace(0, 1 - 1e-6, count)
    for low, high in zip(matching("tdm").ends.tolist(), matching("tdm").starts.tolist(), strict=True):
        sample = Sample(x0, torch.randn(count, 1, 1, 1), torch.full((count,), high), torch.full((count,), low))
        z_t, t = matching("tdm", process).score_input(sample, torch.randn(count, 1, 1, 1), share)
        assert (t.min(), t.max()) == (max(low, 20), high - 11)
        assert (z_t / process.sigma(t).view(-1, 1, 1, 1)).std().item() == pytest.approx(1, abs=0.05)
    _, t = matching("dmd2", process).score_input(sample, x0, share)
    assert (t.min(), t.max()) == (20, 980)


def test_golden_fake_score_of_tdm():
    """The input has x0 0.5, eps -1.1, a step from 499 to 259 and noise 0.25. The formula is from the authors' code."""
    process, objective = VP(), matching("tdm")
    one = torch.ones(1, 1, 1, 1)
    sample = Sample(0.5 * one, -1.1 * one, torch.tensor([499]), torch.tensor([259]))
    draws = MatchingDraws(one, torch.tensor([1]), torch.stack([one, 0.25 * one], 1), torch.tensor([[0.0, 0.5]]), torch.zeros(1))
    fake = Recorder(0.2)
    loss = objective.score_loss(Denoiser(fake, process, "sample"), a_batch(one), draws, sample)
    t = 259 + int(0.5 * (499 - 10 - 259))
    assert fake.t.item() == t
    (a, s), (a_t, s_t) = ((float(process.alphas[i]), float(process.sigmas[i])) for i in (259, t))
    beta = (s_t**2 - (a_t / a * s) ** 2) ** 0.5
    mixed = (-1.1 / a * a_t * s + beta * 0.25) / s_t
    assert fake.z.item() == pytest.approx(a_t * 0.5 + s_t * mixed, abs=1e-5)
    ratio = torch.tensor((0.25**2 - mixed**2) / 2).exp().item()
    assert loss.item() == pytest.approx(min((a_t / s_t) ** 2, 5) * ratio * 0.3**2, rel=1e-4)


@kind_and_process
def test_exact_fake_score_of_a_point_has_no_loss(kind, process):
    """The student always predicts 0.7."""
    fake, objective = exact(process, "v_prediction", mu=0.7, s=0.0), matching(kind, process)
    draws = objective.draw(a_batch().z0, rng())
    draws.eps[:, 1] *= 0.5
    sample = Sample(torch.full(SHAPE, 0.7), torch.randn(SHAPE), objective.starts[:1].expand(B), objective.ends[:1].expand(B))
    assert objective.score_loss(fake, a_batch(), draws, sample) < 1e-6


@every_kind
def test_all_networks_take_w_and_the_teacher_is_guided(kind):
    nets, process = [Recorder(0.3), Recorder(0.2)], VP()
    teacher = Denoiser(lambda z, t, cond, w: cond["states"].view(-1, 1, 1, 1).expand_as(z), process, "sample")
    student, fake = (Denoiser(net, process, "sample") for net in nets)
    objective = matching(kind, w_min=3.0, w_max=3.0)
    draws = objective.draw(a_batch().z0, rng())
    pair = objective.pair(Networks(student, student, teacher, fake), a_batch(cond=-1.0, uncond=-0.8), draws)
    assert all(torch.equal(net.w, draws.w) for net in nets)
    real = -1.0 + 3 * -0.2
    move = (real - 0.2) / (1 if kind == "tdm" else 0.3 - real)
    torch.testing.assert_close(pair.target, torch.full(SHAPE, 0.3 + move))


@pytest.mark.parametrize(("kind", "steps"), [("tdm", 4), ("dmd2", 2)])
def test_saved_scheduler_takes_the_steps_of_the_training(kind, steps):
    objective = matching(kind, steps=steps)
    name, options = objective.scheduler("epsilon")
    assert name == {"tdm": "TCDScheduler", "dmd2": "LCMScheduler"}[kind]
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == objective.starts.tolist()[::-1]
    assert objective.sampling()["phases"] == steps
