"""Classifier-free guidance and the embedding of w."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from lcm.core import solvers
from lcm.core.denoiser import PREDICTION_TYPES, Denoiser
from lcm.core.guidance import embed_w, guide
from lcm.core.process import VP, Flow

RNG = torch.Generator().manual_seed(0)
Z = torch.randn(3, 4, 8, 8, generator=RNG)
COND, UNCOND = ({"states": torch.randn(n, 5, 2, generator=RNG)} for n in (3, 1))
EXPANDED = {"states": UNCOND["states"].expand(3, 5, 2)}
T, S, W = torch.tensor([499, 259, 999]), torch.tensor([479, 239, 979]), torch.tensor([0.0, 7.0, 14.0])
every_process = pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])


def net(z, t, cond, w):
    assert w is None, "a teacher takes no w"
    return torch.tanh(z * cond["states"].mean((1, 2)).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)


def test_guide_is_equation_of_paper():
    w = W.view(3, 1, 1, 1)
    torch.testing.assert_close(guide(Z, Z.cos(), W), (1 + w) * Z - w * Z.cos())


def test_golden_guided_eps():
    assert guide(torch.tensor([[-1.0]]), torch.tensor([[-0.8]]), torch.tensor([7.0])).item() == pytest.approx(-2.4)


@every_process
def test_one_doubled_call_equals_two_calls(process):
    """Guiding the output guides x0 and eps equally."""
    t = T if isinstance(process, VP) else T.clamp(max=979)  # eps does not determine x0 in a flow at 999
    for prediction_type in PREDICTION_TYPES:
        denoiser = Denoiser(net, process, prediction_type)
        x0, eps = denoiser.guided(COND, UNCOND, W)(Z, t)
        cond, uncond = (denoiser.bound(c)(Z, t) for c in (COND, EXPANDED))
        torch.testing.assert_close(x0, guide(cond.x0, uncond.x0, W), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(eps, guide(cond.eps, uncond.eps, W), rtol=1e-4, atol=1e-4)


def test_guided_ddim_is_step_of_paper():
    """Algorithm 1: `z + (1 + w) Psi(c) - w Psi(null)` with Psi the increment of a solver's step."""
    process, w = VP(), W.view(3, 1, 1, 1)
    for prediction_type in PREDICTION_TYPES:
        denoiser = Denoiser(net, process, prediction_type)
        increments = (solvers.ddim(denoiser.bound(cond), Z, T, S, process=process) - Z for cond in (COND, EXPANDED))
        expected = Z + (1 + w) * next(increments) - w * next(increments)
        step = solvers.ddim(denoiser.guided(COND, UNCOND, W), Z, T, S, process=process)
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-4)


def test_guidance_makes_one_call():
    calls = []
    Denoiser(lambda z, *_: calls.append(len(z)) or z, VP()).guided(COND, UNCOND, W)(Z, T)
    assert calls == [6]


@pytest.mark.parametrize("rows", [1, 3])
def test_every_part_of_a_condition_is_doubled(rows):
    """An unconditional condition has one row, or one per sample."""
    cond = {"states": torch.zeros(3, 5, 2), "pooled": torch.zeros(3, 4), "sizes": torch.zeros(3, 6, dtype=torch.int64)}
    uncond, seen = {name: torch.ones_like(part[:rows]) for name, part in cond.items()}, []
    Denoiser(lambda z, time, cond, w: seen.append(cond) or z, VP()).guided(cond, uncond, W)(Z, T)
    for name, part in cond.items():
        assert torch.equal(seen[0][name], torch.cat([part, torch.ones_like(part)]))


def test_golden_embedding():
    golden = {
        6.5: (-0.044785, 0.762962, 0.605186, -0.998997, 0.796084),
        7.0: (0.506885, 0.804387, 0.644218, 0.862013, 0.764842),
        7.5: (-0.851236, 0.842228, 0.681639, -0.524783, 0.731689),
        14.0: (0.873884, 0.955782, 0.985450, 0.486134, 0.169967),
    }
    for w, values in golden.items():
        assert embed_w(torch.tensor([w]))[0, [0, 1, 127, 128, 255]].tolist() == pytest.approx(values, abs=2e-3)


@pytest.mark.parametrize("dim", [256, 33])
def test_embedding_agrees_with_diffusers(dim):
    w = torch.linspace(0, 14, 29)
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, dim)
    torch.testing.assert_close(embed_w(w, dim), theirs, rtol=0, atol=2e-3)


def test_embedding_is_float32_for_any_dtype():
    w = torch.tensor([2.0, 7.5, 14.0])  # exact in bfloat16
    assert torch.equal(embed_w(w.bfloat16()), embed_w(w))
