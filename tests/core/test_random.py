"""Randomness as a pure function of its keys."""

import pytest
import torch

from lcm.core.random import ImageNoise, generator


def numbers(*keys):
    return torch.randn(8, generator=generator("cpu", *keys))


def test_same_keys_same_numbers():
    torch.manual_seed(0)
    first = numbers(0, "noise", 3, 1)
    torch.manual_seed(1)
    assert torch.equal(first, numbers(0, "noise", 3, 1))


@pytest.mark.parametrize("other", [(1, "noise", 3), (0, "w", 3), (0, "noise", 4), (0, "noise"), (3, "noise", 0)])
def test_other_keys_other_numbers(other):
    assert not torch.equal(numbers(0, "noise", 3), numbers(*other))


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    numbers(0)
    ImageNoise([0], (4,))()
    assert torch.equal(torch.get_rng_state(), state)


def test_image_noise_does_not_depend_on_the_batch():
    together, alone = ImageNoise([5, 6, 7], (4, 8, 8)), ImageNoise([7], (4, 8, 8))
    for _ in range(3):  # the first noise and that of later steps
        assert torch.equal(together()[2:], alone())


def test_image_noise_is_fresh_every_time_and_for_every_seed():
    noise = ImageNoise([0, 1], (4, 8, 8))
    first, second = noise(), noise()
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_image_noise_is_standard_normal():
    noise = ImageNoise([0, 1], (4, 64, 64))()
    assert noise.shape == (2, 4, 64, 64)
    assert noise.dtype == torch.float32
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 1), abs=0.02)
