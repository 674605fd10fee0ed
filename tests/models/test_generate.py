"""Images from prompts: independent of the batch, as many forwards as the method needs, and what is refused."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcm.core import sampling
from lcm.core.errors import NonFiniteError, UserError
from lcm.models.text_to_image import TextToImage
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
    """The batch sizes of the UNet's forwards from here on."""
    sizes: list[int] = []
    forward = model.net.forward
    monkeypatch.setattr(model.net, "forward", lambda z, *args, **kwargs: sizes.append(len(z)) or forward(z, *args, **kwargs))
    return sizes


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_an_image_does_not_depend_on_its_batch(name: str, size: int, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    whole = model.latents(PROMPTS, SEEDS, steps=4, w=3.0)
    parts = [model.latents(PROMPTS[i : i + size], SEEDS[i : i + size], steps=4, w=3.0) for i in range(0, 8, size)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5 * float(whole.std()))


def test_ancestral_noise_does_not_depend_on_the_batch_either(teacher: TextToImage) -> None:
    whole = teacher.latents(PROMPTS, SEEDS, steps=3, w=3.0, sampler=sampling.ddpm)
    alone = teacher.latents(PROMPTS[5:6], SEEDS[5:6], steps=3, w=3.0, sampler=sampling.ddpm)
    torch.testing.assert_close(alone, whole[5:6], rtol=1e-5, atol=1e-5 * float(whole.std()))


def test_images_come_in_order_and_in_batches(teacher: TextToImage) -> None:
    batches = list(teacher.images(PROMPTS, SEEDS, steps=2, w=1.0, batch_size=3))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 32, 32), (3, 3, 32, 32), (2, 3, 32, 32)]
    assert (torch.cat(batches).int() - next(teacher.images(PROMPTS, SEEDS, steps=2, w=1.0)).int()).abs().max() <= 1


def test_equal_prompts_and_seeds_give_equal_images_and_others_do_not(student: TextToImage) -> None:
    a, b, seed, prompt = student.latents(["rocket", "rocket", "rocket", "dog face"], [1, 1, 2, 1], steps=2, w=3.0)
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, seed)
    assert not torch.allclose(a, prompt)


def test_a_teacher_without_guidance_runs_one_forward_a_step(teacher: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = forwards(teacher, monkeypatch)
    teacher.latents(PROMPTS[:2], [0, 1], steps=3, w=0.0)
    assert sizes == [2, 2, 2]


def test_a_guided_teacher_runs_both_captions_as_one_forward(teacher: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = forwards(teacher, monkeypatch)
    teacher.latents(PROMPTS[:2], [0, 1], steps=3, w=2.0)
    assert sizes == [4, 4, 4]


def test_w_zero_is_the_limit_of_guidance(teacher: TextToImage) -> None:
    free, nearly = (teacher.latents(PROMPTS, SEEDS, steps=2, w=w) for w in (0.0, 1e-7))
    torch.testing.assert_close(free, nearly, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_a_student_runs_one_forward_a_step(student: TextToImage, w: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = forwards(student, monkeypatch)
    student.latents(PROMPTS[:2], [0, 1], steps=3, w=w)
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize("steps", [0, 51])
def test_a_student_refuses_steps_off_its_grid(student: TextToImage, steps: int) -> None:
    with pytest.raises(UserError, match=f"steps={steps}"):
        student.latents(["rocket"], [0], steps=steps, w=2.0)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_teacher_refuses_steps_off_the_schedule(teacher: TextToImage, steps: int) -> None:
    with pytest.raises(UserError, match=f"steps={steps}"):
        teacher.latents(["rocket"], [0], steps=steps, w=2.0)


def test_a_sampler_that_is_none_is_a_user_error(teacher: TextToImage) -> None:
    """The name comes from a file of whoever made the folder."""
    with pytest.raises(UserError, match=r"lcm\.json names the sampler 'torch': use one of ddim, consistency, tcd"):
        replace(teacher, metadata={"sampler": "torch"}).latents(["rocket"], [0], steps=1, w=0.0)


def test_prompts_need_as_many_seeds(teacher: TextToImage) -> None:
    with pytest.raises(UserError, match="2 prompts need as many seeds, got 1"):
        next(teacher.images(["a", "b"], [0], steps=1, w=0.0))


@pytest.mark.parametrize(("w", "warned"), [(1.5, True), (14.5, True), (2.0, False), (14.0, False)])
def test_a_w_that_a_student_was_not_trained_on_is_warned_of(
    student: TextToImage, w: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        student.check_w(w)
    assert ("outside the range [2, 14]" in caplog.text) == warned


def test_a_w_outside_the_range_is_warned_of_for_guided_distillations_students(
    student: TextToImage, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        replace(student, metadata={**student.metadata, "sampler": "ddim"}).check_w(100.0)
    assert "outside the range [2, 14]" in caplog.text


def test_a_w_that_a_model_has_no_input_for_is_refused(teacher: TextToImage) -> None:
    model = replace(teacher, metadata={"sampler": "consistency"})
    with pytest.raises(
        UserError, match=r"entries\.LCM\.w=4: this consistency model has no input for w.* set entries\.LCM\.w=0"
    ):
        model.check_w(4.0, "entries.LCM.w")
    model.check_w(0.0)


@pytest.mark.parametrize(("size", "shape"), [(None, (32, 32)), (64, (64, 64)), ([48, 36], (48, 36)), ((8, 68), (8, 68))])
def test_images_have_the_height_and_width_asked_for(size: object, shape: tuple[int, int], student: TextToImage) -> None:
    """Multiples of the VAE's factor; the UNet takes latents that its own levels do not divide."""
    [image] = next(student.images(["rocket"], [0], steps=2, w=3.0, size=size))
    assert image.shape == (3, *shape)


def test_the_own_size_asked_for_changes_nothing(teacher: TextToImage) -> None:
    own, asked = (teacher.latents(PROMPTS[:2], SEEDS[:2], steps=2, w=3.0, size=size) for size in (None, [32, 32]))
    assert torch.equal(own, asked)


@pytest.mark.parametrize("size", [0, -8, 2, True, 32.0, "32", "32x32", [32], [32, 32, 32], [32, "32"], [32, 0], [[32], 32], {}])
def test_what_is_no_size_is_refused(size: object, teacher: TextToImage) -> None:
    with pytest.raises(UserError, match=r"expected pixels, from 4 on: size=512, or \[height,width\] as size=\[768,512\]"):
        teacher.size(size)


@pytest.mark.parametrize("size", [63, [64, 63]])
def test_a_size_off_the_vaes_grid_is_refused(size: object, teacher: TextToImage) -> None:
    with pytest.raises(UserError, match="63 is not a multiple of the VAE's factor 4: use 60 or 64"):
        teacher.size(size)


def test_a_unet_without_a_size_needs_one(tiny_pipeline: Path) -> None:
    model = TextToImage.load(str(tiny_pipeline))
    model.net.register_to_config(sample_size=None)
    with pytest.raises(UserError, match="has no sample_size: set size=<pixels>"):
        model.latents(["rocket"], [0], steps=1, w=0.0)
    assert model.latents(["rocket"], [0], steps=1, w=0.0, size=32).shape == (1, 4, 8, 8)


def test_drawing_is_without_dropout_and_leaves_every_mode_as_it_was(tiny_pipeline: Path) -> None:
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("network", "what"), [("unet", "latents are not finite: the UNet"), ("vae", "images are not finite: the VAE")]
)
def test_images_that_are_not_finite_are_an_error(network: str, what: str, value: float, tiny_pipeline: Path) -> None:
    model = TextToImage.load(str(tiny_pipeline))
    damaged = model.net.conv_out if network == "unet" else model.codec.vae.decoder.conv_out
    damaged.weight.data[:] = value
    with pytest.raises(NonFiniteError, match=what):
        next(model.images(["rocket"], [0], steps=1, w=0.0))


def test_a_teacher_takes_any_w(teacher: TextToImage, caplog: pytest.LogCaptureFixture) -> None:
    teacher.check_w(99.0)
    assert not caplog.text


def test_a_loaded_model_is_frozen(teacher: TextToImage) -> None:
    assert not teacher.net.training
    assert not any(p.requires_grad for p in teacher.net.parameters())
    assert not teacher.latents(["rocket"], [0], steps=1, w=1.0).requires_grad


def test_compiling_is_asked_of_every_network_that_repeats(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch):
    """Without doing it: it takes minutes on a CPU."""
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(type(self).__name__))
    TextToImage.load(str(tiny_pipeline))
    assert asked == []
    TextToImage.load(str(tiny_pipeline), compile=True)
    assert asked == ["UNet2DConditionModel", "Decoder"]
