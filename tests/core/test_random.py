"""Randomness as a pure function of its keys."""

import pytest
import torch

from lcm.core.random import ImageNoise, RankSlice, generator, normal


def numbers(*keys):
    return torch.randn(8, generator=generator("cpu", *keys))


def test_same_keys_same_numbers():
    torch.manual_seed(0)
    first = numbers(0, "noise", 3, 1)
    torch.manual_seed(1)
    assert torch.equal(first, numbers(0, "noise", 3, 1))


def test_other_keys_other_numbers():
    for other in ((1, "noise", 3), (0, "w", 3), (0, "noise", 4), (0, "noise"), (3, "noise", 0)):
        assert not torch.equal(numbers(0, "noise", 3), numbers(*other))


def test_global_generator_is_unchanged():
    state = torch.get_rng_state()
    numbers(0)
    ImageNoise([0], (4,))()
    assert torch.equal(torch.get_rng_state(), state)


def test_image_noise_does_not_depend_on_batch():
    together, alone = ImageNoise([5, 6, 7], (4, 8, 8)), ImageNoise([7], (4, 8, 8))
    for _ in range(3):
        assert torch.equal(together()[2:], alone())


def test_image_noise_differs_by_call_and_seed():
    noise = ImageNoise([0, 1], (4, 8, 8))
    first, second = noise(), noise()
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_image_noise_is_standard_normal():
    noise = ImageNoise([0, 1], (4, 64, 64))()
    assert noise.shape == (2, 4, 64, 64)
    assert noise.dtype == torch.float32
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 1), abs=0.02)


def rows(rank, world_size, count):
    return normal(
        torch.Size((count, 3)), RankSlice("cpu", 0, "train", 5, rank=rank, world_size=world_size), torch.device("cpu")
    )


@pytest.mark.parametrize(("total", "world_sizes"), [(96, (2, 3, 8)), (1024, (4, 256))])
def test_noise_does_not_depend_on_world_size(total, world_sizes):
    alone = rows(0, 1, total)
    for world_size in world_sizes:
        ranks = [rows(rank, world_size, total // world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(ranks), alone)
    assert len(alone.unique()) == alone.numel()


def test_noise_of_one_block_is_stable():
    assert torch.equal(rows(0, 1, 64), torch.randn(64, 3, generator=generator("cpu", 0, "train", 5, 0)))


def test_rank_draws_few_blocks():
    """The noise of a global batch of 2,304 at 512 px is 151 MB."""
    world_size, count = 256, 9
    for rank in (0, world_size // 2, world_size - 1):
        blocks = list(RankSlice("cpu", 0, rank=rank, world_size=world_size).blocks(count))
        assert sum(size for size, _, _ in blocks) < count + 2 * 64
