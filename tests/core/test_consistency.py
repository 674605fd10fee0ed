"""The consistency function and its boundary condition."""

import pytest
import torch
from diffusers import LCMScheduler

from lcm.core.consistency import boundary_scalings, cm_consistency_fn, cm_scalings, consistency_fn
from lcm.core.denoiser import PREDICTION_TYPES, Denoised, Denoiser
from lcm.core.process import VP, Flow

Z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_golden_scalings():
    golden = [  # t, c_skip, c_out
        (0, 1, 0),
        (1, 2.49376559e-3, 0.998752339),
        (2, 6.24609619e-4, 0.999687646),
        (5, 9.99900010e-5, 0.999950004),
        (19, 6.92515980e-6, 0.999996537),
        (39, 1.64365279e-6, 0.999999178),
        (259, 3.72683756e-8, 0.999999981),
        (499, 1.00401202e-8, 0.999999995),
        (999, 2.50500750e-9, 0.999999999),
    ]
    for t, c_skip, c_out in golden:
        scalings = [c.item() for c in boundary_scalings(torch.tensor([t]))]
        assert scalings[0] == pytest.approx(c_skip, rel=1e-6)
        assert scalings[1] == pytest.approx(c_out, abs=1e-7)


def test_golden_scalings_of_another_timestep_scaling():
    c_skip, c_out = boundary_scalings(torch.tensor([1]), timestep_scaling=1.0)
    assert (c_skip.item(), c_out.item()) == pytest.approx((0.2, 0.894427191))


def test_scalings_agree_with_diffusers():
    t, scheduler = torch.arange(1000), LCMScheduler()
    theirs = torch.tensor([scheduler.get_scalings_for_boundary_condition_discrete(int(i)) for i in t])
    torch.testing.assert_close(torch.stack(boundary_scalings(t), 1), theirs, rtol=1e-5, atol=1e-12)


def test_boundary():
    """f(z, 0) = z exactly, for any network."""
    assert torch.equal(consistency_fn(lambda z, t: Denoised(1e6 * z.cos(), z), Z, torch.tensor([0, 0]), process=VP()), Z)


@pytest.mark.parametrize("f", [consistency_fn, cm_consistency_fn])
def test_boundary_of_flow(f):
    """f(z, -1) = z exactly, without scalings."""
    flow = Flow(shift=3.0)
    for prediction_type in PREDICTION_TYPES:
        denoise = Denoiser(lambda z, time, cond, w: 1e6 * z.cos(), flow, prediction_type).bound({})
        assert torch.equal(f(denoise, Z, torch.tensor([-1, -1]), process=flow), Z)


@pytest.mark.parametrize("f", [consistency_fn, cm_consistency_fn])
def test_f_in_flow_is_x0(f):
    """`f = y - sigma u`, in pure noise and at the first timestep."""
    flow, t = Flow(), torch.tensor([999, 0])
    denoise = Denoiser(lambda z, time, cond, w: z.cos(), flow, "flow_prediction").bound({})
    expected = Z - torch.tensor([1.0, 0.001]).view(2, 1, 1, 1) * Z.cos()
    torch.testing.assert_close(f(denoise, Z, t, process=flow), expected, rtol=0, atol=1e-6)


def test_f_away_from_boundary_is_x0():
    f = consistency_fn(lambda z, t: Denoised(z.cos(), z), Z, torch.tensor([19, 999]), process=VP())
    torch.testing.assert_close(f, Z.cos(), rtol=0, atol=1e-4)


def test_each_sample_has_its_own_t():
    def denoise(z, t):
        return Denoised(z * t.view(-1, 1, 1, 1), z)

    together = consistency_fn(denoise, Z, torch.tensor([0, 3]), process=VP())
    alone = [consistency_fn(denoise, Z[i : i + 1], torch.tensor([t]), process=VP()) for i, t in enumerate((0, 3))]
    assert torch.equal(together, torch.cat(alone))


# Consistency Models


def test_golden_scalings_of_consistency_models():
    """The paper has sigma_data = 0.5 and epsilon = 0.002 (2303.01469, appendix C)."""
    c_skip, c_out = cm_scalings(torch.tensor([0.002, 0.5, 1.0, 80.0], dtype=torch.float64), 0.002, sigma_data=0.5)
    assert c_skip.tolist() == pytest.approx([1.0, 0.502004024, 0.200641922, 3.9066e-5], rel=1e-4, abs=1e-12)
    assert c_out.tolist() == pytest.approx([0.0, 0.352138482, 0.446319169, 0.499977734], rel=1e-4, abs=1e-12)


def test_boundary_of_consistency_models():
    """f(x, sigma_min) = x with x = z / alpha, for any network."""
    process, t = VP(), torch.tensor([0, 0])
    for prediction_type in PREDICTION_TYPES:
        denoise = Denoiser(lambda z, time, cond, w: 1e6 * z.cos(), process, prediction_type).bound({})
        f = cm_consistency_fn(denoise, Z, t, process=process, sigma_data=1.0)
        assert torch.equal(f, Z / process.alphas[0])


def test_f_of_consistency_models_far_from_boundary_is_x0():
    f = cm_consistency_fn(lambda z, t: Denoised(z.cos(), z), Z, torch.tensor([800, 999]), process=VP(), sigma_data=1.0)
    torch.testing.assert_close(f, Z.cos(), rtol=0.02, atol=0.03)
