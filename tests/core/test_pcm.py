"""Phased consistency distillation and the phases of TSCD: golden values, phases, and the saved sampler and scheduler."""

import diffusers
import pytest
import torch

from lcm.core import losses, sampling, solvers
from lcm.core.errors import UserError
from lcm.core.objectives.consistency import ConsistencyDraws, Networks
from lcm.core.objectives.pcm import PhasedConsistencyDistillation
from lcm.core.objectives.tcd import TrajectoryConsistencyDistillation, TrajectoryDraws
from lcm.core.process import VP, Flow
from lcm.core.timesteps import consistency_steps, full, grid, phase_edges, phase_end, trailing_steps
from tests.core.gaussian import exact
from tests.core.test_objectives import B, Recorder, Scale, a_batch, denoisers, returns_caption, some_draws

every_process = pytest.mark.parametrize("process", [VP(), Flow(shift=3.0)], ids=["vp", "flow_3"])


def pcm(process=None, **changes):
    options = {"timesteps": grid(), "solver": solvers.ddim, "distance": losses.l2, **changes}
    return PhasedConsistencyDistillation(process or VP(), **options)


def tscd(*phases, process=None):
    gamma = 0.0 if isinstance(process, Flow) else 0.3
    options = {"timesteps": grid(), "solver": solvers.ddim, "distance": losses.l2, "gamma": gamma}
    return TrajectoryConsistencyDistillation(process or VP(), phases=list(phases), **options)


@pytest.mark.parametrize(("index", "student", "target"), [(24, -0.329010810, -0.356895834), (25, -0.762305307, -0.685645465)])
def test_golden_pcm(index, student, target):
    """The edges are from the authors' code. 499 -> 479 lies within (239, 499]. 519 -> 499 ends at an edge."""
    seen, one = [], torch.ones(1, 1, 1, 1)
    objective = pcm(distance=lambda x, y: seen.extend((x.item(), y.item())) or losses.l2(x, y))
    objective.edges = torch.tensor([0, 239, 499, 739])
    objective.loss(
        denoisers(Recorder(-1.1), Recorder(-0.9), returns_caption),
        a_batch(0.5 * one, cond=-1.0, uncond=-0.8),
        ConsistencyDraws(-1.2 * one, torch.tensor([index]), torch.tensor([7.0])),
    )
    assert seen == pytest.approx([student, target], abs=2e-6)


# phases


@pytest.mark.parametrize(("process", "phases"), [(VP(), 4), (Flow(shift=3.0), 8)])
def test_phases_start_at_the_steps_of_the_sampler(process, phases):
    steps = trailing_steps(phases) if isinstance(process, Flow) else consistency_steps(phases)
    edges = phase_edges(process, phases, 50)
    assert edges.tolist() == [process.t_min, *sorted(steps)[:-1]]
    for start, end in zip(steps, reversed(edges.tolist()), strict=True):
        assert phase_end(torch.tensor([start]), edges).item() == end


def test_every_time_belongs_to_the_phase_below_it():
    edges = phase_edges(VP(), 4, 50)
    times = torch.arange(1, 1000)
    ends = phase_end(times, edges)
    assert (ends < times).all()
    assert ends.unique().tolist() == [0, 259, 499, 759]
    assert (ends.diff() >= 0).all()


def test_phases_need_a_grid():
    with pytest.raises(UserError, match="phases end at points of a grid: set model/timesteps=grid"):
        pcm(timesteps=full())
    assert pcm(timesteps=full(), phases=1).edges.tolist() == [0]


@every_process
def test_no_step_leaves_its_phase(process):
    """The teacher's step ends at the end of the phase, and so do both jumps."""
    for skip_steps in (20, 50, 400):
        target, ends = Recorder(0.1), []
        objective = pcm(process, skip_steps=skip_steps)
        compare = objective.compare_jumps
        objective.compare_jumps = lambda *args, compare=compare, ends=ends: ends.append(args[-2]) or compare(*args)
        draws = some_draws(0, 13, 26, 49)
        objective.loss(denoisers(Scale(0.2), target, Scale(0.3), process=process), a_batch(), draws)
        t = grid()[draws.index]
        assert torch.equal(ends[0], phase_end(t, objective.edges))
        expected = torch.maximum(t - skip_steps, ends[0])
        torch.testing.assert_close(target.t, process.network_time(expected))


def test_one_phase_is_tcd_to_the_clean_end():
    draws, nets = some_draws(0, 12, 24, 48), denoisers(Scale(0.5), Scale(0.4), Scale(0.3))
    tcd = TrajectoryDraws(draws.eps, draws.index, draws.w, torch.zeros(B))
    expected = tscd(1).loss(nets, a_batch(), tcd)[0]
    torch.testing.assert_close(pcm(phases=1).loss(nets, a_batch(), draws)[0], expected)


def test_exact_networks_have_no_loss_on_point_mass():
    student = exact(VP(), "v_prediction", mu=0.7, s=0.0)
    assert pcm().loss(Networks(student, student, student), a_batch(), some_draws(2, 12, 24, 38))[0] < 1e-8


def test_teacher_without_guidance_ignores_w_and_the_empty_caption():
    objective = pcm(classifier_free_guidance=True)
    losses_of = []
    for w, uncond in ((0.0, -0.8), (7.0, 3.0)):
        draws = some_draws(2, 12, 24, 38)
        draws.w = torch.full((B,), w)
        nets = denoisers(Scale(0.2), Scale(0.4), returns_caption)
        losses_of.append(objective.loss(nets, a_batch(cond=-1.0, uncond=uncond), draws)[0])
    assert torch.equal(*losses_of)


def test_w_with_guidance_at_sampling_is_an_error():
    with pytest.raises(UserError, match=r"distils without w: set model\.w_min=null model\.w_max=null"):
        pcm(classifier_free_guidance=True, w_min=2.0, w_max=5.0)


@every_process
def test_pair_lies_at_the_end_of_its_phase_and_knows_its_start(process):
    """A start is an edge or the noisy end. The start of a phase of TSCD does not depend on the drawn end time."""
    draws, nets = some_draws(0, 13, 26, 49), denoisers(Scale(0.2), Scale(0.4), Scale(0.3), process=process)
    starts = [249, 499, 749, 999] if isinstance(process, Flow) else [259, 499, 759, 999]
    pair = pcm(process).pair(nets, a_batch(), draws)
    assert pair.start.tolist() == starts
    assert pair.end.tolist() == [process.t_min, *starts[:-1]]
    tscd_draws = TrajectoryDraws(*vars(draws).values(), torch.full((B,), 0.7))
    assert tscd(4, process=process).pair(nets, a_batch(), tscd_draws).start.tolist() == starts


# the curriculum of TSCD


def test_end_times_stay_in_the_phase():
    objective = tscd(4)
    t = grid().repeat_interleave(64)
    edge = phase_end(t, objective.edges)
    s = torch.maximum(t - 20, edge)
    ends = objective.end_time(s, torch.rand(len(t)), edge)
    assert (ends >= edge).all()
    assert (ends <= s).all()
    assert len(ends[(t == 499)].unique()) > 5


def test_stages_follow_the_training():
    objective = tscd(8, 4, 2, 1)
    phases = []
    for step in range(100):
        objective.advance(step, 100)
        phases.append(len(objective.edges))
    assert phases == [8] * 25 + [4] * 25 + [2] * 25 + [1] * 25
    objective.advance(30, 100)  # a resumed training
    assert len(objective.edges) == 4


def test_one_stage_of_one_phase_is_tcd():
    plain = TrajectoryConsistencyDistillation(VP(), timesteps=grid(), solver=solvers.ddim, distance=losses.l2)
    draws = TrajectoryDraws(*vars(some_draws(0, 12, 24, 48)).values(), torch.tensor([0.1, 0.4, 0.6, 0.9]))
    nets = denoisers(Scale(0.5), Scale(0.4), Scale(0.3))
    assert torch.equal(tscd(1).loss(nets, a_batch(), draws)[0], plain.loss(nets, a_batch(), draws)[0])
    assert "phases" not in tscd(8, 1).sampling()
    assert tscd(8, 4).sampling()["phases"] == 4


def test_no_stage_is_an_error():
    with pytest.raises(UserError, match=r"phases=\[\] has no stage"):
        tscd()


# saved students


def test_sampler_is_saved():
    assert pcm().sampling() == {"sampler": "tcd", "points": 50, "gamma": 0.0, "phases": 4}
    assert pcm(classifier_free_guidance=True).sampling()["classifier_free_guidance"] is True


def test_saved_scheduler_steps_from_edge_to_edge():
    objective = pcm(phases=8)
    name, options = objective.scheduler("epsilon")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist()[1:] == objective.edges.tolist()[:0:-1]


@pytest.mark.parametrize("objective", [pcm, lambda flow, phases: tscd(8, phases, process=flow)], ids=["pcm", "tscd"])
@pytest.mark.parametrize("phases", [2, 4, 8])
def test_saved_scheduler_of_flow_steps_from_edge_to_edge(objective, phases):
    flow = Flow(shift=3.0)
    trained = objective(flow, phases=phases)
    trained.advance(99, 100)
    name, options = trained.scheduler("flow_prediction")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(phases)
    expected = flow.sigma(torch.tensor([999, *trained.edges.tolist()[:0:-1]]))
    torch.testing.assert_close(scheduler.sigmas[:-1], expected, rtol=0, atol=1e-6)


def test_sampler_jumps_from_edge_to_edge():
    """A network that is right within each phase draws the data: one step for each phase is enough."""
    process, objective = VP(), pcm()
    data, noise = torch.full((1, 1, 1, 1), 0.7), torch.full((1, 1, 1, 1), -1.2)
    times = []

    def denoise(z, t):
        times.append(t.item())
        return data, noise

    z = sampling.tcd(denoise, noise, [999, *objective.edges.tolist()[:0:-1]], process=process, noise=lambda: 1 / 0, gamma=0.0)
    assert times == [999, 759, 499, 259]
    torch.testing.assert_close(z, process.jump(data, noise, torch.tensor([0])))
