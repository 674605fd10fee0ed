"""Pipeline folders: errors, round trips, and equal images in diffusers."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from lcm.core import sampling
from lcm.core.errors import UserError
from lcm.core.objectives.denoising import ddim_scheduler
from lcm.core.process import VP
from lcm.core.random import ImageNoise
from lcm.models.pipeline import (
    download,
    find,
    load_codec,
    load_family,
    load_network,
    load_prediction_type,
    load_process,
    read_lcm_json,
)
from lcm.models.saving import save_pipeline
from lcm.models.text_to_image import Start, TextToImage
from tests.conftest import tiny_unet
from tests.models.conftest import save_student, save_teacher

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*steps_offset:FutureWarning")
PROMPTS = ["red apple on a white background", "rocket"]
SEEDS = [3, 11]


@pytest.fixture(scope="module")
def student(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a consistency model with random weights in the projection of w, and return its folder."""
    return save_student(tmp_path_factory.mktemp("pipelines") / "student", tiny_pipeline, w_min=2.0, w_max=14.0)


def test_missing_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no pipeline folder"):
        find(str(tmp_path / "nowhere"))
    for name in ("https://huggingface.co/owner/name", "s3://bucket/model", "./owner/name", "model", ""):
        with pytest.raises(UserError, match="pipeline folder"):
            find(name)


def test_unreachable_hub_id_is_an_error() -> None:
    with pytest.raises(UserError, match="neither a folder here nor reachable"):
        find("nobody/nothing")


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        ({"unet/model.safetensors", "unet/model.fp16.safetensors"}, {"unet/model.safetensors"}),
        ({"unet/model.fp16.safetensors", "vae/model.fp16-00001-of-00002.safetensors"}, None),
        (
            {"unet/model.safetensors", "unet/model.non_ema.safetensors", "unet/a.bin", "b.ckpt"},
            {"unet/model.safetensors"},
        ),
        (
            {"transformer/model.safetensors", "transformer/model.fp16.safetensors", "tokenizer/spiece.model"},
            {"transformer/model.safetensors", "tokenizer/spiece.model"},
        ),
    ],
    ids=["both", "fp16 alone", "others", "transformer"],
)
def test_download_skips_unused_files(files, fetched, tmp_path: Path, monkeypatch) -> None:
    def snapshot_download(hub_id: str, **patterns: Any) -> str:
        for name in filter_repo_objects(files, **patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    download("owner/name")
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")} == (fetched or files)


def test_missing_parts_are_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline, tmp_path / "half", ignore=shutil.ignore_patterns("unet", "tokenizer"))
    with pytest.raises(UserError, match=r"is not a whole StableDiffusionPipeline: it lacks unet, tokenizer$"):
        find(str(tmp_path / "half"))


def test_unknown_class_is_an_error(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "odd")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableCascadePipeline"}))
    with pytest.raises(
        UserError, match=r"which is not supported: use one of .*, PixArtAlphaPipeline, StableDiffusion3Pipeline"
    ):
        find(str(folder))


@pytest.mark.parametrize("file", ["lcm.json", "unet/config.json"])
def test_broken_json_is_an_error(tiny_pipeline: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "broken")
    (folder / file).write_text('{"sample_size": ')
    with pytest.raises(UserError, match=f"{file}.* (is )?not .*JSON"):
        TextToImage.load(str(folder))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"in_channels": 9}, "takes 9 channels and gives 4, its latents have 4: give a text-to-image pipeline"),
        ({"num_class_embeds": 10}, "takes a class label besides the text"),
        ({"class_embed_type": "timestep"}, "takes a class label besides the text"),
    ],
)
def test_unsuitable_unet_is_an_error(tiny_pipeline: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "odd")
    tiny_unet(**changes).save_pretrained(folder / "unet")
    with pytest.raises(UserError, match=says):
        load_network(str(folder))


def test_text_width_mismatch_is_an_error(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "odd")
    tiny_unet(cross_attention_dim=24).save_pretrained(folder / "unet")
    with pytest.raises(UserError, match="text embeddings of width 24, but its text encoders give 16: use the text encoders"):
        load_network(str(folder))


def test_vae_with_latent_statistics_is_an_error(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "odd")
    file = folder / "vae/config.json"
    changes = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match="its VAE has latents_mean, latents_std, which"):
        load_codec(str(folder))


def test_unknown_prediction_type_is_refused_before_weights_are_read(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "epsilom"}))
    with pytest.raises(UserError, match=r"scheduler_config\.json has an unknown prediction_type 'epsilom': use one of ep"):
        load_network(str(folder))


@pytest.mark.parametrize("consistency", [False, True])
def test_round_trip_keeps_weights_and_schedule(tiny_pipeline: Path, tmp_path: Path, consistency: bool) -> None:
    process = VP(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=True)
    torch.manual_seed(0)
    unet = load_family(str(tiny_pipeline)).with_w(load_network(str(tiny_pipeline)), zero_init=False)
    if consistency:
        folder = save_student(tmp_path / "saved", tiny_pipeline, "v_prediction", process, w_max=3.0)
    else:
        folder = save_teacher(tmp_path / "saved", unet, tiny_pipeline, "v_prediction", process, w_max=3.0)
    loaded = load_network(folder).state_dict()
    assert loaded.keys() == unet.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in unet.state_dict().items())
    assert load_process(folder).config == process.config
    assert torch.equal(load_process(folder).alphas, process.alphas)
    assert load_prediction_type(folder) == "v_prediction"
    metadata = {"sampler": "consistency", "points": 50} if consistency else {"sampler": "ddim"}
    assert read_lcm_json(folder) == {**metadata, "w_max": 3.0}
    assert TextToImage.load(folder).consistency == consistency


def test_saving_does_not_change_network(tiny_pipeline: Path, tmp_path: Path) -> None:
    unet = load_network(str(tiny_pipeline))
    options = {"family": load_family(str(tiny_pipeline)), "base": tiny_pipeline, "metadata": {"sampler": "ddim"}}
    save_pipeline(tmp_path / "half", unet, **options, scheduler=ddim_scheduler(VP(), "epsilon"), dtype=torch.float16)
    assert unet.dtype == torch.float32
    saved = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float16}


def test_failed_save_keeps_old_folder(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_teacher(tmp_path / "saved", load_network(str(tiny_pipeline)), tiny_pipeline)
    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_teacher(tmp_path / "saved", load_network(folder), tiny_pipeline)
    assert find(folder)


def test_pipeline_can_be_saved_over_its_base(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "saved", load_network(str(tiny_pipeline)), tiny_pipeline)
    assert find(save_teacher(tmp_path / "saved", load_network(folder), Path(folder)))


def test_saved_configs_do_not_name_folders_of_this_machine(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "saved", load_network(str(tiny_pipeline)), tiny_pipeline)
    again = save_teacher(tmp_path / "again", load_network(folder), Path(folder))
    configs = list(Path(again).glob("*/*config.json"))
    assert len(configs) >= 4
    assert not [file for file in configs if str(tmp_path) in file.read_text() or str(tiny_pipeline) in file.read_text()]


def assert_alike(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Compare with a tolerance relative to the standard deviation."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.std()))


def teacher_latents(folder: str, steps: int, w: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return our latents and those of diffusers for the same initial noise."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": w + 1, "num_inference_steps": steps, "latents": ImageNoise(SEEDS, (4, 8, 8))()}
    theirs = pipe(PROMPTS, output_type="latent", **options).images
    return TextToImage.load(folder).latents(PROMPTS, SEEDS, steps=steps, w=w, sampler=sampling.ddim), theirs


@pytest.mark.parametrize(("steps", "w"), [(4, 7.5), (10, 0.0)])
def test_teacher_samples_agree_with_diffusers(tiny_pipeline: Path, steps: int, w: float) -> None:
    assert_alike(*teacher_latents(str(tiny_pipeline), steps, w))


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_samples_of_schedules_agree_with_diffusers(tiny_pipeline: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    process = VP(**{key: value for key, value in options.items() if key != "prediction_type"})
    folder = save_teacher(
        tmp_path / "teacher", load_network(str(tiny_pipeline)), tiny_pipeline, options["prediction_type"], process
    )
    assert_alike(*teacher_latents(folder, 5, 4.0), tolerance=1e-3)


def test_diffusers_opens_teacher_without_warning(tiny_pipeline: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        StableDiffusionPipeline.from_pretrained(tiny_pipeline)


def test_images_agree_with_diffusers(tiny_pipeline: Path) -> None:
    """The images differ by at most one grey level, because both programs round."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    noise = ImageNoise(SEEDS, (4, 8, 8))()
    theirs = pipe(PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    [ours] = TextToImage.load(str(tiny_pipeline)).images(PROMPTS, SEEDS, steps=4, w=2.0, sampler=sampling.ddim)
    assert (ours - 255 * theirs).abs().max() <= 1


@pytest.mark.parametrize(("steps", "strength"), [(3, 0.6), (2, 0.25)])
def test_img2img_agrees_with_diffusers(tiny_pipeline: Path, steps: int, strength: float) -> None:
    """diffusers counts the steps of the whole schedule."""
    model, image = TextToImage.load(str(tiny_pipeline)), torch.arange(3 * 32 * 32).reshape(3, 32, 32).remainder(256).byte()
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 4.0, "num_inference_steps": round(steps / strength), "strength": strength}
    theirs = [
        pipe(prompt, model.codec.encode_mean(image[None]), generator=ImageNoise([seed], ()).generators, output_type="latent",
             **options).images
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]  # fmt: skip
    ours = model.latents(PROMPTS, SEEDS, steps=steps, w=3.0, sampler=sampling.ddim, start=Start(image, strength))
    assert_alike(ours, torch.cat(theirs))


def student_samples(folder: str, steps: int, w: float, output_type: str = "latent") -> torch.Tensor:
    """Return samples of diffusers. diffusers draws all noise of an image from one generator, like `ImageNoise`."""
    pipe = LatentConsistencyModelPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": w + 1, "num_inference_steps": steps, "generator": ImageNoise(SEEDS, (4, 8, 8)).generators}
    return pipe(PROMPTS, output_type=output_type, **options).images


@pytest.mark.parametrize(("steps", "w"), [(1, 2.0), (4, 11.5), (8, 2.0)])
def test_student_samples_agree_with_diffusers(student: str, steps: int, w: float) -> None:
    ours = TextToImage.load(student).latents(PROMPTS, SEEDS, steps=steps, w=w)
    assert_alike(ours, student_samples(student, steps, w))


def test_samples_of_grids_agree_with_diffusers(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = save_student(tmp_path / "model", tiny_pipeline, points=100)
    ours = TextToImage.load(folder).latents(PROMPTS, SEEDS, steps=3, w=6.0)
    assert_alike(ours, student_samples(folder, 3, 6.0))


def test_samples_of_v_student_agree_with_diffusers(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = save_student(tmp_path / "v", tiny_pipeline, "v_prediction", VP(rescale_betas_zero_snr=True))
    assert_alike(TextToImage.load(folder).latents(PROMPTS, SEEDS, steps=4, w=6.0), student_samples(folder, 4, 6.0))


def test_student_images_agree_with_diffusers(student: str) -> None:
    [ours] = TextToImage.load(student).images(PROMPTS, SEEDS, steps=4, w=7.0)
    assert (ours - 255 * student_samples(student, 4, 7.0, "pt")).abs().max() <= 1


def test_any_prompt_is_encoded(tiny_pipeline: Path) -> None:
    codec = load_codec(str(tiny_pipeline))
    tokenizer = codec.text.tokenizers[0]
    for prompt in ("", " ", "naïve café", "红苹果", "🍎🚀", "\x00\n\t", "<|endoftext|> <|startoftext|>", "a" * 500, "ß𝔘" * 40):
        [ids] = tokenizer([prompt], padding="max_length", truncation=True).input_ids
        assert len(ids) == 16
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert codec.text([prompt])["states"].isfinite().all()
    for prompt in ("naïve café", "红苹果", "🍎🚀"):
        assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True).strip() == prompt
