"""Classifier-free guidance and the embedding of w."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from lcm.core import solvers
from lcm.core.guidance import embed_w, guide
from lcm.core.networks import conditioned, guided
from lcm.core.prediction import PREDICTION_TYPES
from lcm.core.schedule import NoiseSchedule

RNG = torch.Generator().manual_seed(0)
Z = torch.randn(3, 4, 8, 8, generator=RNG)
COND, UNCOND = torch.randn(3, 5, 2, generator=RNG), torch.randn(1, 5, 2, generator=RNG)
T, S, W = torch.tensor([499, 259, 999]), torch.tensor([479, 239, 979]), torch.tensor([0.0, 7.0, 14.0])
every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def net(z, t, cond, w):
    assert w is None, "a teacher has no w"
    return torch.tanh(z * cond.mean((1, 2)).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)


def test_w_zero_is_conditional():
    assert torch.equal(guide(Z, -Z, torch.zeros(3)), Z)


def test_guide_is_the_papers_equation():
    w = W.view(3, 1, 1, 1)
    torch.testing.assert_close(guide(Z, Z.cos(), W), (1 + w) * Z - w * Z.cos())


def test_golden_guided_eps():
    assert guide(torch.tensor([[-1.0]]), torch.tensor([[-0.8]]), torch.tensor([7.0])).item() == pytest.approx(-2.4)


@every_type
def test_one_doubled_forward_is_two_forwards(prediction_type):
    """Guiding the output guides x0 and eps alike."""
    schedule = NoiseSchedule(prediction_type=prediction_type)
    x0, eps = guided(net, COND, UNCOND, schedule, W)(Z, T)
    cond, uncond = (conditioned(net, c, schedule)(Z, T) for c in (COND, UNCOND.expand_as(COND)))
    torch.testing.assert_close(x0, guide(cond.x0, uncond.x0, W), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eps, guide(cond.eps, uncond.eps, W), rtol=1e-4, atol=1e-4)


@every_type
def test_guided_ddim_is_the_papers_step(prediction_type):
    """Algorithm 1: `z + (1 + w) Psi(c) - w Psi(null)` with Psi the increment of a solver's step."""
    schedule = NoiseSchedule(prediction_type=prediction_type)

    def psi(cond):
        return solvers.ddim(conditioned(net, cond, schedule), Z, T, S, schedule=schedule) - Z

    w = W.view(3, 1, 1, 1)
    expected = Z + (1 + w) * psi(COND) - w * psi(UNCOND.expand_as(COND))
    step = solvers.ddim(guided(net, COND, UNCOND, schedule, W), Z, T, S, schedule=schedule)
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-4)


def test_guidance_costs_one_forward():
    calls = []
    guided(lambda z, *_: calls.append(len(z)) or z, COND, UNCOND, NoiseSchedule(), W)(Z, T)
    assert calls == [6]


@pytest.mark.parametrize(
    ("w", "golden"),
    [
        (6.5, (-0.044785, 0.762962, 0.605186, -0.998997, 0.796084)),
        (7.0, (0.506885, 0.804387, 0.644218, 0.862013, 0.764842)),
        (7.5, (-0.851236, 0.842228, 0.681639, -0.524783, 0.731689)),
        (14.0, (0.873884, 0.955782, 0.985450, 0.486134, 0.169967)),
    ],
)
def test_golden_embedding(w, golden):
    e = embed_w(torch.tensor([w]))[0]
    assert e[[0, 1, 127, 128, 255]].tolist() == pytest.approx(golden, abs=2e-3)


def test_embedding_of_zero():
    assert embed_w(torch.zeros(1))[0].tolist() == [0.0] * 128 + [1.0] * 128


def test_embeddings_norm():
    torch.testing.assert_close(embed_w(torch.linspace(0, 14, 29)).square().sum(1), torch.full((29,), 128.0))


@pytest.mark.parametrize("dim", [256, 33])
def test_embedding_agrees_with_diffusers(dim):
    w = torch.linspace(0, 14, 29)
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, dim)
    torch.testing.assert_close(embed_w(w, dim), theirs, rtol=0, atol=2e-3)


def test_embedding_is_float32_whatever_w():
    w = torch.tensor([2.0, 7.5, 14.0])  # exact in bfloat16
    assert torch.equal(embed_w(w.bfloat16()), embed_w(w))
