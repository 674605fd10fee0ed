"""Timesteps of training and sampling."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from lcm.core.errors import UserError
from lcm.core.process import VP, Flow
from lcm.core.timesteps import consistency_steps, full, grid, karras, neighbours, points_of, skip_pair, trailing_steps


def test_grid_of_released_models():
    assert grid().tolist() == list(range(19, 1000, 20))
    assert grid().sum() == 25450


def test_grid_ends_at_pure_noise():
    for num_timesteps, points in ((1000, 1), (1000, 100), (1000, 1000), (500, 50), (64, 8)):
        times = grid(num_timesteps, points=points)
        assert len(times) == points
        assert times[-1] == num_timesteps - 1
        assert times.diff().unique().numel() <= 1


@pytest.mark.parametrize("points", [0, 60])
def test_grid_errors(points):
    with pytest.raises(UserError, match=f"{points}"):
        grid(points=points)


def test_points_of_grid():
    for points in (1, 20, 50, 1000):
        assert points_of(grid(points=points)) == points
        assert points_of(grid(500, points=points // 2 or 1), 500) == (points // 2 or 1)
    for timesteps in (full(), full(skip_steps=1), karras(VP())[1:], grid(500), grid()[:-1]):
        assert points_of(timesteps) is None


def test_full_is_every_t_with_partner():
    assert full(skip_steps=20).tolist() == list(range(20, 1000))
    assert full(100, skip_steps=1).tolist() == list(range(1, 100))


def test_skip_pair_on_grid():
    t, s = skip_pair(grid(), torch.tensor([0, 1, 24, 49]), 20)
    assert t.tolist() == [19, 39, 499, 999]
    assert s.tolist() == [0, 19, 479, 979]


def test_skip_pair_on_full_schedule():
    t, s = skip_pair(full(skip_steps=20), torch.arange(980), 20)
    assert ((t - s) == 20).all()
    assert s.min() == 0


def test_golden_consistency_steps():
    golden = {
        1: [999],
        2: [999, 499],
        3: [999, 679, 339],
        4: [999, 759, 499, 259],
        5: [999, 799, 599, 399, 199],
        6: [999, 839, 679, 499, 339, 179],
        8: [999, 879, 759, 639, 499, 379, 259, 139],
        10: list(range(999, 0, -100)),
        25: list(range(999, 0, -40)),
        50: list(range(999, 0, -20)),
    }
    assert {steps: consistency_steps(steps) for steps in golden} == golden
    assert [consistency_steps(4, points=points) for points in (100, 200)] == [[999, 749, 499, 249]] * 2


@pytest.mark.parametrize("points", [50, 100])
def test_consistency_steps_agree_with_diffusers(points):
    scheduler = LCMScheduler(original_inference_steps=points)
    for steps in range(1, points + 1):
        scheduler.set_timesteps(steps)
        assert consistency_steps(steps, points=points) == scheduler.timesteps.tolist()


def test_trailing_steps_agree_with_diffusers():
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for steps in [*range(1, 48), 50, 100, 125, 200, 250, 500, 1000]:  # others tie at .5, or diffusers returns one too many
        scheduler.set_timesteps(steps)
        assert trailing_steps(steps) == scheduler.timesteps.tolist()


def test_trailing_steps_decrease_from_pure_noise():
    for steps in range(1, 1001):
        times = trailing_steps(steps)
        assert len(times) == steps
        assert times[0] == 999
        assert times[-1] >= 0
        assert sorted(set(times), reverse=True) == times


@pytest.mark.parametrize(("rule", "steps", "most"), [(consistency_steps, 51, 50), (trailing_steps, 0, 1000)])
def test_too_few_or_too_many_steps(rule, steps, most):
    with pytest.raises(UserError, match=f"steps={steps} .*: use 1 to {most}"):
        rule(steps)


def test_karras_points_are_even_in_the_seventh_root():
    points, process = 40, VP()
    times = karras(process, points=points)
    assert (times[0], times[-1], len(times)) == (0, 999, points)
    ratio = (process.sigmas / process.alphas).double()
    root = ratio ** (1 / 7)
    spacing = (root[-1] - root[0]) / (points - 1)
    # Each point is within half a timestep of its ideal position.
    off = (root[times] - root[0] - spacing * torch.arange(points)).abs()
    nearest = root.diff()[(times - 1).clamp_min(0)] / 2
    assert (off <= nearest + 1e-6).all() or (off < spacing / 2).all()


def test_karras_agrees_with_the_formula():
    """2303.01469: `t_i = (t_min^(1/7) + i / (N - 1) (t_max^(1/7) - t_min^(1/7)))^7`."""
    process = VP()
    ratio = (process.sigmas / process.alphas).double()
    low, high = ratio[0] ** (1 / 7), ratio[-1] ** (1 / 7)
    wanted = [(low + i / 17 * (high - low)) ** 7 for i in range(18)]
    got = ratio[karras(process, points=18)]
    torch.testing.assert_close(got, torch.stack(wanted), rtol=0.06, atol=0)


@pytest.mark.parametrize("points", [1, 1001])
def test_karras_errors(points):
    with pytest.raises(UserError, match=f"points={points}"):
        karras(VP(), points=points)


def test_fine_karras_grid_has_no_duplicates():
    times = karras(VP(), points=500)
    assert (times.diff() > 0).all()


def test_karras_of_flow_reaches_pure_noise():
    """sigma / alpha is infinite at the noisy end of a flow. It is bounded by 1 / FLOOR."""
    times = karras(Flow(), points=18)
    assert (times[0], times[-1]) == (0, 999)
    assert (times.diff() > 0).all()


def test_pairs_of_flow_end_clean():
    _, s = skip_pair(grid(), torch.tensor([0, 1, 49]), 20, t_min=-1)
    assert s.tolist() == [-1, 19, 979]
    _, s = skip_pair(grid(), torch.tensor([0, 1, 49]), 50, t_min=-1)
    assert s.tolist() == [-1, -1, 949]
    _, s = neighbours(torch.tensor([10, 30, 999]), torch.tensor([0, 1, 2]), t_min=-1)
    assert s.tolist() == [-1, 10, 30]


def test_neighbours():
    t, s = neighbours(torch.tensor([10, 30, 999]), torch.tensor([0, 1, 2, 2]))
    assert t.tolist() == [10, 30, 999, 999]
    assert s.tolist() == [0, 10, 30, 30]


def test_consistency_steps_of_trained_timesteps():
    trained = [2, 8, 21, 49, 999]
    assert consistency_steps(1, trained=trained) == [999]
    assert consistency_steps(2, trained=trained) == [999, 21]
    assert consistency_steps(5, trained=trained) == trained[::-1]
    with pytest.raises(UserError, match="use 1 to 5"):
        consistency_steps(6, trained=trained)
