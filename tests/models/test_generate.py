"""Sampling of images from prompts: independence of the batch, number of network calls, sizes, and errors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcm.core import sampling
from lcm.core.errors import NonFiniteError, UserError
from lcm.core.random import ImageNoise
from lcm.models.text_to_image import Start, TextToImage
from tests.models.conftest import save_student

PROMPTS = [
    f"{name} on a {colour} background" for name in ("red apple", "dog face") for colour in ("white", "pink", "gray", "blue")
]
SEEDS = [5, 1, 9, 7, 1, 2, 30, 4]


@pytest.fixture(scope="module")
def teacher(tiny_pipeline: Path) -> TextToImage:
    return TextToImage.load(str(tiny_pipeline))


@pytest.fixture(scope="module")
def student(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    folder = tmp_path_factory.mktemp("pipelines") / "student"
    return TextToImage.load(save_student(folder, tiny_pipeline, w_min=2.0, w_max=14.0))


def forwards(model: TextToImage, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the batch sizes of the network's calls."""
    sizes: list[int] = []
    forward = model.net.forward
    monkeypatch.setattr(model.net, "forward", lambda z, *args, **kwargs: sizes.append(len(z)) or forward(z, *args, **kwargs))
    return sizes


@pytest.mark.parametrize(("name", "size"), [("teacher", 3), ("student", 1)])
def test_image_does_not_depend_on_batch(name: str, size: int, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    whole = model.latents(PROMPTS, SEEDS, steps=4, w=3.0)
    parts = [model.latents(PROMPTS[i : i + size], SEEDS[i : i + size], steps=4, w=3.0) for i in range(0, 8, size)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5 * float(whole.std()))


def test_ancestral_noise_does_not_depend_on_batch(teacher: TextToImage) -> None:
    whole = teacher.latents(PROMPTS, SEEDS, steps=3, w=3.0, sampler=sampling.ddpm)
    alone = teacher.latents(PROMPTS[5:6], SEEDS[5:6], steps=3, w=3.0, sampler=sampling.ddpm)
    torch.testing.assert_close(alone, whole[5:6], rtol=1e-5, atol=1e-5 * float(whole.std()))


def test_images_come_in_ordered_batches(teacher: TextToImage) -> None:
    batches = list(teacher.images(PROMPTS, SEEDS, steps=2, w=1.0, batch_size=3))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 32, 32), (3, 3, 32, 32), (2, 3, 32, 32)]
    assert (torch.cat(batches).int() - next(teacher.images(PROMPTS, SEEDS, steps=2, w=1.0)).int()).abs().max() <= 1


def test_prompt_and_seed_determine_image(student: TextToImage) -> None:
    a, b, seed, prompt = student.latents(["rocket", "rocket", "rocket", "dog face"], [1, 1, 2, 1], steps=2, w=3.0)
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, seed)
    assert not torch.allclose(a, prompt)


@pytest.mark.parametrize(
    ("name", "w", "calls"), [("teacher", 0.0, [2, 2, 2]), ("teacher", 2.0, [4, 4, 4]), ("student", 2.0, [2, 2, 2])]
)
def test_one_network_call_per_step(
    name: str, w: float, calls: list[int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guided teacher doubles the batch."""
    model = request.getfixturevalue(name)
    sizes = forwards(model, monkeypatch)
    model.latents(PROMPTS[:2], [0, 1], steps=3, w=w)
    assert sizes == calls


def test_w_zero_is_limit_of_guidance(teacher: TextToImage) -> None:
    free, nearly = (teacher.latents(PROMPTS, SEEDS, steps=2, w=w) for w in (0.0, 1e-7))
    torch.testing.assert_close(free, nearly, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "too_many"), [("student", 51), ("teacher", 1001)])
def test_impossible_steps_are_an_error(name: str, too_many: int, request: pytest.FixtureRequest) -> None:
    for steps in (0, too_many):
        with pytest.raises(UserError, match=f"steps={steps}"):
            request.getfixturevalue(name).latents(["rocket"], [0], steps=steps, w=2.0)


def test_negative_prompt_without_effect_is_an_error(teacher: TextToImage, student: TextToImage) -> None:
    with pytest.raises(UserError, match=r"negative='text' has no effect: this model is not guided when it is sampled"):
        student.check_negative("text", 2.0)
    with pytest.raises(UserError, match=r"negative='text' has no effect without guidance: set w above 0"):
        teacher.check_negative("text", 0.0)
    teacher.check_negative("text", 2.0)
    student.check_negative("", 2.0)


def test_infinite_w_is_an_error(teacher: TextToImage) -> None:
    with pytest.raises(UserError, match=r"w=-inf is not a finite number: set w=4"):
        teacher.check_w(float("-inf"))


def test_unknown_sampler_in_lcm_json_is_an_error(teacher: TextToImage) -> None:
    with pytest.raises(UserError, match=r"lcm\.json names the sampler 'torch': use one of ddim, consistency, tcd"):
        replace(teacher, metadata={"sampler": "torch"}).latents(["rocket"], [0], steps=1, w=0.0)


def test_seed_count_is_checked(teacher: TextToImage) -> None:
    with pytest.raises(UserError, match="2 prompts need as many seeds, got 1"):
        next(teacher.images(["a", "b"], [0], steps=1, w=0.0))


def test_w_outside_range_is_warned_of(student: TextToImage, caplog: pytest.LogCaptureFixture) -> None:
    """Students of guided distillation have ddim as their sampler."""
    model = replace(student, metadata={**student.metadata, "sampler": "ddim"})
    for w in (2.0, 14.0):
        model.check_w(w)
    assert not caplog.text
    for w in (1.5, 14.5):
        caplog.clear()
        model.check_w(w)
        assert "outside the range [2, 14]" in caplog.text


def test_w_without_input_is_an_error(teacher: TextToImage) -> None:
    model = replace(teacher, metadata={"sampler": "consistency"})
    with pytest.raises(
        UserError, match=r"entries\.LCM\.w=4: this consistency model has no input for w.* set entries\.LCM\.w=0"
    ):
        model.check_w(4.0, "entries.LCM.w")
    model.check_w(0.0)


@pytest.mark.parametrize(("size", "shape"), [(64, (64, 64)), ((8, 68), (8, 68))])
def test_images_have_requested_size(size: object, shape: tuple[int, int], student: TextToImage) -> None:
    """A size is any multiple of the VAE's factor. The UNet's levels need not divide the latents."""
    [image] = next(student.images(["rocket"], [0], steps=2, w=3.0, size=size))
    assert image.shape == (3, *shape)


def test_invalid_size_is_an_error(teacher: TextToImage) -> None:
    for size in (0, -8, 2, True, 32.0, "32", "32x32", [32], [32, 32, 32], [32, "32"], [32, 0], [[32], 32], {}):
        with pytest.raises(UserError, match=r"expected pixels, from 4 on: size=512, or \[height,width\] as size=\[768,512\]"):
            teacher.size(size)
    for size in (63, [64, 63]):
        with pytest.raises(UserError, match="63 is not a multiple of the VAE's factor 4: use 60 or 64"):
            teacher.size(size)


def test_unet_without_sample_size_needs_size(tiny_pipeline: Path) -> None:
    model = TextToImage.load(str(tiny_pipeline))
    model.net.register_to_config(sample_size=None)
    with pytest.raises(UserError, match="has no sample_size: set size=<pixels>"):
        model.latents(["rocket"], [0], steps=1, w=0.0)
    assert model.latents(["rocket"], [0], steps=1, w=0.0, size=32).shape == (1, 4, 8, 8)


def test_sampling_is_without_dropout_and_restores_modes(tiny_pipeline: Path) -> None:
    model = TextToImage.load(str(tiny_pipeline))
    expected = model.latents(["rocket"], [0], steps=2, w=3.0)
    for name, part in model.net.train().named_modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
        if "mid_block" in name:
            part.eval()
    modes = [part.training for part in model.net.modules()]
    assert torch.equal(model.latents(["rocket"], [0], steps=2, w=3.0), expected)
    with pytest.raises(UserError, match="steps=0"):
        model.latents(["rocket"], [0], steps=0, w=3.0)
    assert [part.training for part in model.net.modules()] == modes
    assert len(set(modes)) == 2


@pytest.mark.parametrize(
    ("network", "value", "says"),
    [("unet", float("nan"), "latents are not finite: the UNet"), ("vae", float("inf"), "images are not finite: the VAE")],
)
def test_non_finite_images_are_an_error(network: str, value: float, says: str, tiny_pipeline: Path) -> None:
    model = TextToImage.load(str(tiny_pipeline))
    damaged = model.net.conv_out if network == "unet" else model.codec.vae.decoder.conv_out
    damaged.weight.data[:] = value
    with pytest.raises(NonFiniteError, match=says):
        next(model.images(["rocket"], [0], steps=1, w=0.0))


def test_teacher_takes_any_w(teacher: TextToImage, caplog: pytest.LogCaptureFixture) -> None:
    teacher.check_w(99.0)
    assert not caplog.text


def test_loaded_model_is_frozen(teacher: TextToImage) -> None:
    assert not teacher.net.training
    assert not any(p.requires_grad for p in teacher.net.parameters())
    assert not teacher.latents(["rocket"], [0], steps=1, w=1.0).requires_grad


def test_compile_covers_network_and_decoder(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch):
    """compile() is replaced, as it takes minutes on a CPU."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    TextToImage.load(str(tiny_pipeline))
    assert compiled == []
    TextToImage.load(str(tiny_pipeline), compile=True)
    assert compiled == ["UNet2DConditionModel", "Decoder"]


def test_identity_holds_what_images_depend_on(teacher: TextToImage) -> None:
    other = replace(teacher, prediction_type="v_prediction")
    assert other.identity() != teacher.identity()
    identity, scale = teacher.identity(), teacher.codec.vae.config["scaling_factor"]
    try:
        teacher.codec.vae.register_to_config(scaling_factor=2 * scale)
        assert teacher.identity() != identity
    finally:
        teacher.codec.vae.register_to_config(scaling_factor=scale)
    assert teacher.identity() == identity


PICTURE = torch.arange(32 * 32 * 3).reshape(3, 32, 32).remainder(256).byte()


@pytest.mark.parametrize(("steps", "strength", "first"), [(3, 0.6, 599), (2, 0.9, 999)])
def test_strength_is_the_start_of_sampling(steps: int, strength: float, first: int, student: TextToImage) -> None:
    timesteps = student.timesteps(steps, strength=strength)
    assert len(timesteps) == steps
    assert abs(timesteps[0] - first) <= 20  # the start is a point of the grid
    assert timesteps == sorted(timesteps, reverse=True)


def test_strength_takes_steps_of_a_student_of_phases(student: TextToImage) -> None:
    phased = replace(student, metadata={**student.metadata, "phases": 4})
    whole = phased.timesteps(4)
    assert [phased.timesteps(4, strength=strength) for strength in (0.5, 0.75, 0.01)] == [whole[2:], whole[1:], whole[3:]]
    with pytest.raises(UserError, match=r"^strength=0.05: this share of the model's timesteps has fewer than steps=4: raise"):
        student.timesteps(4, strength=0.05)


@pytest.mark.parametrize(("pipeline", "w"), [("tiny_pipeline", 3.0), ("sd3_pipeline", 0.0)])
def test_sampling_starts_from_the_picture(pipeline: str, w: float, request: pytest.FixtureRequest) -> None:
    """The first network call sees the picture's latent with the noise of the seed, in VP and in flow."""
    model = TextToImage.load(str(request.getfixturevalue(pipeline)))
    seen = []

    def sampler(denoise, z, timesteps, *, process, noise):
        seen.append((z, timesteps[0]))
        return z

    start = Start(PICTURE, 0.5)
    model.latents(["rocket"], [3], steps=4, w=w, sampler=sampler, start=start)
    (z, t), z0 = seen[0], model.codec.encode_mean(PICTURE[None])
    assert abs(t - 499) <= 1
    [pure] = ImageNoise([3], tuple(z.shape[1:]))()
    torch.testing.assert_close(z, model.process.jump(z0, pure[None], torch.tensor([t])))


def test_kept_part_stays(teacher: TextToImage) -> None:
    mask = torch.zeros(1, 32, 32)
    mask[:, :, 17:] = 1
    start = Start(PICTURE, 1.0, mask)
    z, z0 = teacher.latents(["rocket"], [3], steps=3, w=3.0, start=start), teacher.codec.encode_mean(PICTURE[None])
    assert torch.equal(z[..., :4], z0[..., :4])
    assert ((z - z0)[..., 4:].abs().mean(dim=(0, 1, 2)) > 0.1).all()  # a latent with a painted pixel is drawn
