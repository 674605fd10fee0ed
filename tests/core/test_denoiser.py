"""The four prediction types in every process, and a denoiser called with points of another process."""

import pytest
import torch

from lcm.core import solvers
from lcm.core.denoiser import PREDICTION_TYPES, Denoiser, convert_process
from lcm.core.errors import UserError
from lcm.core.process import VP, Flow
from tests.core.gaussian import exact

every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
PROCESSES = {
    "scaled_linear": VP(),
    "squaredcos_cap_v2": VP(beta_schedule="squaredcos_cap_v2"),
    "zero_snr": VP(rescale_betas_zero_snr=True),
    "flow": Flow(),
    "flow_3": Flow(shift=3.0),
}
THREE = {name: PROCESSES[name] for name in ("scaled_linear", "zero_snr", "flow_3")}
three_processes = pytest.mark.parametrize("process", THREE.values(), ids=THREE)
T = torch.tensor([0, 1, 259, 499, 979, 999])
X0, EPS = torch.randn(2, len(T), 4, 8, 8, generator=torch.Generator().manual_seed(0))


def of(prediction_type, process=None):
    """Return a denoiser without a network."""
    return Denoiser(None, process or VP(), prediction_type)


@three_processes
def test_read_inverts_target_in_every_process(process):
    """The timestep 999 is left out: in pure noise eps does not determine x0."""
    t = torch.tensor([0, 1, 19, 259, 499, 979])
    for prediction_type in PREDICTION_TYPES:
        denoiser = of(prediction_type, process)
        x0, eps = denoiser.read(denoiser.target(X0, EPS, t), process.jump(X0, EPS, t), t)
        torch.testing.assert_close(x0, X0, rtol=0, atol=1e-4)
        torch.testing.assert_close(eps, EPS, rtol=0, atol=1e-3)


@pytest.mark.parametrize("process", [PROCESSES["zero_snr"], PROCESSES["flow"]], ids=["zero_snr", "flow"])
def test_read_inverts_target_in_pure_noise(process):
    t = torch.full((len(X0),), 999)
    for prediction_type in ("v_prediction", "sample", "flow_prediction"):
        denoiser = of(prediction_type, process)
        x0, eps = denoiser.read(denoiser.target(X0, EPS, t), process.jump(X0, EPS, t), t)
        torch.testing.assert_close(x0, X0, rtol=0, atol=1e-5)
        torch.testing.assert_close(eps, EPS, rtol=0, atol=1e-5)


@every_type
def test_target_inverts_read(prediction_type):
    """The identity holds for any output of the network."""
    denoiser = of(prediction_type)
    output, z_t = X0, EPS
    x0, eps = denoiser.read(output, z_t, T)
    torch.testing.assert_close(denoiser.target(x0, eps, T), output, rtol=0, atol=1e-4)


@three_processes
def test_x0_and_eps_add_up_to_z_t(process):
    """The identity holds for any output. In a flow's pure noise the x0 of an eps network is bounded instead."""
    for prediction_type in PREDICTION_TYPES:
        t = T[:-1] if process.alpha(T[-1:]) == 0 and prediction_type == "epsilon" else T
        output, z_t = X0[: len(t)], EPS[: len(t)]
        denoised = of(prediction_type, process).read(output, z_t, t)
        torch.testing.assert_close(process.jump(*denoised, t), z_t, rtol=0, atol=1e-4)


def test_golden_v():
    denoiser = of("v_prediction")
    x0, eps, t = torch.full((1, 1), 0.5), torch.full((1, 1), -1.2), torch.tensor([499])
    v = denoiser.target(x0, eps, t)
    assert v.item() == pytest.approx(-1.057282526, abs=1e-6)
    denoised = denoiser.read(v, denoiser.process.jump(x0, eps, t), t)
    assert (denoised.x0.item(), denoised.eps.item()) == pytest.approx((0.5, -1.2), abs=1e-6)


def test_golden_flow():
    """`u = eps - x0` in every process."""
    x0, eps, t = torch.full((1, 1), 0.5), torch.full((1, 1), -1.2), torch.tensor([499])
    for process in (Flow(), VP()):
        assert of("flow_prediction", process).target(x0, eps, t).item() == pytest.approx(-1.7, abs=1e-6)


@pytest.mark.parametrize("process", [PROCESSES["zero_snr"], PROCESSES["flow"]], ids=["zero_snr", "flow"])
def test_pure_noise_is_finite(process):
    for prediction_type in PREDICTION_TYPES:
        x0, eps = of(prediction_type, process).read(X0[:1], EPS[:1], torch.tensor([999]))
        assert x0.isfinite().all()
        assert eps.isfinite().all()


@every_type
def test_x0_at_clean_end_of_flow_is_z(prediction_type):
    """The identity holds for any network."""
    x0, eps = of(prediction_type, Flow()).read(1e6 * X0, EPS, torch.full((len(X0),), -1))
    assert torch.equal(x0, EPS)
    assert eps.isfinite().all()


@pytest.mark.parametrize("process", [VP(), Flow(shift=3.0)], ids=["vp", "flow_3"])
def test_network_gets_time_of_process(process):
    times = []
    Denoiser(lambda z, time, cond, w: times.append(time) or z, process).bound({})(X0, T)
    expected = 1000 * process.sigma(T) if isinstance(process, Flow) else T
    assert torch.equal(times[0], expected)


def test_output_in_half_precision_is_read_in_float32():
    x0, eps = Denoiser(lambda z, time, cond, w: z.bfloat16(), VP(), "v_prediction").bound({})(X0, T)
    assert x0.dtype == eps.dtype == torch.float32


def test_unknown_prediction_type_names_the_choices():
    with pytest.raises(UserError, match="unknown prediction_type 'eps': use one of epsilon, v_prediction, sample"):
        of("eps")


# conversion between processes

PAIRS = [
    ("zero_snr", "flow"),
    ("flow_3", "scaled_linear"),
    ("scaled_linear", "flow_3"),
]
COMMON = torch.tensor([100, 200, 259, 499, 700, 800])  # every process has these timesteps' noise levels


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_converted_perfect_denoiser_is_perfect(inner, outer):
    inner, outer = PROCESSES[inner], PROCESSES[outer]
    z = outer.jump(X0, EPS, COMMON)
    x0, eps = convert_process(exact(inner, "v_prediction").bound({}), inner, outer)(z, COMMON)
    expected = exact(outer, "v_prediction").bound({})(z, COMMON)
    torch.testing.assert_close(x0, expected.x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(eps, expected.eps, rtol=0, atol=1e-4)
    torch.testing.assert_close(outer.jump(x0, eps, COMMON), z, rtol=0, atol=1e-4)


def test_step_of_vp_teacher_in_flow_is_mapped_step():
    """`y = x / (alpha + sigma)`, `q = sigma / (alpha + sigma)`: DDIM with any network."""
    vp, flow = VP(), Flow(num_train_timesteps=100_000)  # fine enough for VP's noise levels
    t, s = torch.tensor([499, 759, 259]), torch.tensor([479, 499, 0])
    x, denoise = X0[:3], Denoiser(lambda z, time, cond, w: (z + time.view(-1, 1, 1, 1) / 1000).tanh(), vp).bound({})
    total = {name: sum(vp.at(time, 4)) for name, time in (("t", t), ("s", s))}
    flow_t, flow_s = (flow.timestep_at(vp.half_log_snr(time)) for time in (t, s))
    y_s = solvers.ddim(convert_process(denoise, vp, flow), x / total["t"], flow_t, flow_s, process=flow)
    torch.testing.assert_close(y_s, solvers.ddim(denoise, x, t, s, process=vp) / total["s"], rtol=0, atol=2e-5)


def test_conversion_to_same_process_is_identity():
    denoise = exact(VP()).bound({})
    assert convert_process(denoise, VP(), VP()) is denoise
    assert convert_process(denoise, VP(), VP(beta_end=0.02)) is not denoise


@pytest.mark.parametrize(("t", "inner_t"), [(999, 999), (-1, 0)])
def test_conversion_clamps_to_inner_noise_levels(t, inner_t):
    """Stable Diffusion's noise ends at q = 0.936. Pure noise is passed to its last timestep unchanged."""
    calls = []
    teacher = Denoiser(lambda z, time, cond, w: calls.append((z, time)) or z, VP())
    convert_process(teacher.bound({}), VP(), Flow())(EPS[:1], torch.tensor([t]))
    [(z, time)] = calls
    assert time.item() == inner_t
    torch.testing.assert_close(z, EPS[:1])
