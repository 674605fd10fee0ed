"""Every family: training, distillation, adapters, saving, and samples that equal those of diffusers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_flow_match_lcm

from lcm.core import sampling
from lcm.core.errors import UserError
from lcm.core.random import ImageNoise
from lcm.data.datamodule import ShardDataModule
from lcm.models.families import families
from lcm.models.pipeline import load_codec, load_family, load_process
from lcm.models.text_to_image import TextToImage
from tests.data.conftest import png, write_shard
from tests.modules.conftest import new_module

PROMPTS, SEEDS = ["red apple on a white background", "rocket"], [3, 11]


@pytest.fixture(scope="module")
def pipelines(tiny_pipeline: Path, xl_pipeline: Path, pixart_pipeline: Path, sd3_pipeline: Path) -> dict[str, Path]:
    return {"tiny": tiny_pipeline, "xl": xl_pipeline, "pixart": pixart_pipeline, "sd3": sd3_pipeline}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    samples = [{"__key__": str(i), "png": png((256, 256), colour=(40 * i, 90, 200)), "txt": PROMPTS[i % 2]} for i in range(6)]
    write_shard(folder / "0.tar", samples)
    return folder


@pytest.fixture
def trained(pipelines: dict[str, Path], pictures: Path, fit: Any) -> Callable[..., Any]:
    """`trained(name, kind, steps)` returns a module after a few steps, by default at the pipeline's own size."""

    def train(
        name: str, kind: str, steps: int = 2, pipeline: Path | None = None, resolution: int | None = None, **options: Any
    ) -> Any:
        folder = pipeline or pipelines[name]
        module, codec = new_module(folder, kind, **options), load_codec(str(folder))
        side = resolution or module.net.config["sample_size"] * codec.factor
        data = ShardDataModule(f"{pictures}/0.tar", codec=codec, resolution=side, num_workers=0, batch_size=2, shuffle=0)
        fit(module, data, steps)
        return module

    return train


def opened(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4 * float(theirs.std()))


def noises() -> list[torch.Generator]:
    return ImageNoise(SEEDS, ()).generators


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FlowMatchLCMScheduler draw each image's noise from its own seed, because the pipeline passes no generator on."""
    seeded = ImageNoise(SEEDS, ()).generators
    first = [torch.randn((16, 4, 4), generator=generator) for generator in seeded]  # the pipeline draws its own noise first
    del first

    def randn(shape: Any, **options: Any) -> torch.Tensor:
        return torch.stack([torch.randn(shape[1:], generator=generator) for generator in seeded])

    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", randn)


def latents(model: TextToImage) -> torch.Tensor:
    side = model.net.config["sample_size"]
    return ImageNoise(SEEDS, (model.net.config["in_channels"], side, side))()


def test_families_are_found() -> None:
    assert {kind.__name__ for kind in families()} >= {"StableDiffusion", "StableDiffusionXL", "PixArt", "StableDiffusion3"}


@pytest.mark.parametrize(("name", "steps"), [("pixart", 4), ("sd3", 1), ("sd3", 4)])
def test_teacher_matches_diffusers(name: str, steps: int, pipelines: dict[str, Path]) -> None:
    """The sampler is DDIM in VP and Euler in a flow. Both use guidance and the trailing grid."""
    model, pipe = TextToImage.load(str(pipelines[name])), opened(pipelines[name])
    options: dict[str, Any] = {"num_inference_steps": steps, "latents": latents(model), "guidance_scale": 4.0}
    if name == "sd3":  # its scheduler's own grid ends at sigma = 0.009, see few_step_flow
        options["sigmas"] = [1 - i / steps for i in range(steps)]
    theirs = pipe(PROMPTS, output_type="latent", **options).images
    ours = model.latents(PROMPTS, SEEDS, steps=steps, w=3.0, sampler=sampling.ddim)
    alike(ours, theirs)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("xl", "guided"),
        *(("pixart", kind) for kind in ("ct", "lora")),
        *(("sd3", kind) for kind in ("diffusion", "cd")),
    ],
)
def test_method_trains_family(name: str, kind: str, trained: Any) -> None:
    if (name, kind) == ("pixart", "lora"):
        with pytest.raises(UserError, match=r"diffusers has no adapters for PixArtAlphaPipeline: set model.adapters=null"):
            trained(name, kind, 1)
        return
    module = trained(name, kind, 6 if kind == "guided" else 1)
    start = new_module(Path(module.pipeline), kind)
    changed = [
        key for key, p in module.net.named_parameters() if p.requires_grad and not torch.equal(p, start.net.get_parameter(key))
    ]
    assert changed
    assert all(p.isfinite().all() for p in module.net.parameters())


@pytest.mark.parametrize("name", ["tiny", "pixart", "sd3"])
def test_student_matches_diffusers(name: str, trained: Any, tmp_path: Path, noisy: None) -> None:
    """From the same noise, the first call of the saved folder in diffusers draws the latents of sample.py.

    A training that starts from the saved folder saves a folder of the same family.
    """
    module = trained(name, "distillation", 2, zero_init=False)
    module.save_model(str(tmp_path / "model"), dtype=torch.float32)
    model, pipe = TextToImage.load(str(tmp_path / "model")), opened(tmp_path / "model")
    w = 7.0 if model.family.takes_w(model.net) and name == "tiny" else 0.0
    options = {"num_inference_steps": 4, "guidance_scale": w + 1, "generator": noises()}
    theirs = pipe(PROMPTS, output_type="latent", **options).images
    alike(model.latents(PROMPTS, SEEDS, steps=4, w=w), theirs)
    assert load_process(str(tmp_path / "model")).config == load_process(module.pipeline).config
    again = trained(name, "finetuning", 1, pipeline=tmp_path / "model")
    again.save_model(str(tmp_path / "again"), dtype=torch.float32)
    assert type(load_family(str(tmp_path / "again"))) is type(module.family)


@pytest.mark.parametrize("name", ["tiny", "sd3"])
def test_tcd_student_matches_diffusers(name: str, trained: Any, tmp_path: Path) -> None:
    gamma = 0.0 if name == "sd3" else 0.3
    module = trained(name, "tcd", 2, zero_init=False, **{"objective.gamma": gamma})
    module.save_model(str(tmp_path / "model"), dtype=torch.float32)
    model, pipe = TextToImage.load(str(tmp_path / "model")), opened(tmp_path / "model")
    assert type(pipe.scheduler).__name__ == ("FlowMatchEulerDiscreteScheduler" if name == "sd3" else "TCDScheduler")
    w = 7.0 if name == "tiny" else 0.0
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": w + 1, "generator": noises()}
    if name != "sd3":
        options["eta"] = gamma
    theirs = pipe(PROMPTS, output_type="latent", **options).images
    alike(model.latents(PROMPTS, SEEDS, steps=4, w=w), theirs)


@pytest.mark.parametrize(("name", "guided"), [("tiny", False), ("tiny", True), ("sd3", False), ("sd3", True)])
def test_pcm_student_matches_diffusers(name: str, guided: bool, trained: Any, tmp_path: Path) -> None:
    """Sampling takes one step per phase.

    A student of an unguided teacher takes a negative prompt, and its pipeline guides it.
    """
    options: dict[str, Any] = {"objective.classifier_free_guidance": True, "w_min": None, "w_max": None} if guided else {}
    module = trained(name, "pcm", 2, zero_init=False, **options)
    module.save_model(str(tmp_path / "model"), dtype=torch.float32)
    model, pipe = TextToImage.load(str(tmp_path / "model")), opened(tmp_path / "model")
    assert model.takes_w == (guided or name == "tiny")
    w = 3.0 if model.takes_w else 0.0
    negative = {"negative_prompt": ["rocket"] * 2} if guided else {}
    call = {"num_inference_steps": 4, "guidance_scale": w + 1, "generator": noises(), **negative}
    theirs = pipe(PROMPTS, output_type="latent", **call).images
    ours = model.latents(PROMPTS, SEEDS, steps=4, w=w, negative="rocket" if guided else "")
    alike(ours, theirs)
    assert guided == (not torch.equal(ours, model.latents(PROMPTS, SEEDS, steps=4, w=w)))
    with pytest.raises(UserError, match="steps=2: this model was distilled in 4 phases: set steps=4"):
        model.timesteps(2)


@pytest.mark.parametrize(
    ("name", "kind", "rank"),
    [("tiny", "tdm", None), ("tiny", "dmd2", None), ("sd3", "tdm", None), ("pixart", "dmd2", None), ("tiny", "tdm", 4)],
)
def test_matched_student_matches_diffusers(name: str, kind: str, rank: int | None, trained: Any, tmp_path: Path) -> None:
    module = trained(name, kind, 2, adapters=rank and {"rank": rank})
    module.save_model(str(tmp_path / "model"), dtype=torch.float32)
    model, pipe = TextToImage.load(str(tmp_path / "model")), opened(tmp_path / "model")
    w = 7.0 if model.takes_w else 0.0
    assert model.takes_w == (name == "tiny" and rank is None)
    assert (tmp_path / "model/pytorch_lora_weights.safetensors").is_file() == bool(rank)
    options = {"num_inference_steps": 4, "guidance_scale": w + 1, "generator": noises()}
    alike(model.latents(PROMPTS, SEEDS, steps=4, w=w), pipe(PROMPTS, output_type="latent", **options).images)


def test_flow_adapters_match_diffusers(trained: Any, tmp_path: Path, noisy: None) -> None:
    module = trained("sd3", "lora", 2, lr=0.05)
    module.save_model(str(tmp_path / "model"), dtype=torch.float32)
    model, pipe = TextToImage.load(str(tmp_path / "model")), opened(tmp_path / "model")
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": noises()}
    theirs = pipe(PROMPTS, output_type="latent", **options).images
    alike(model.latents(PROMPTS, SEEDS, steps=4, w=0.0), theirs)
    assert (tmp_path / "model/pytorch_lora_weights.safetensors").is_file()


def test_fixed_size_network_refuses_other_sizes(trained: Any) -> None:
    with pytest.raises(UserError, match=r"PixArtAlphaPipeline is trained at its own size only: set data\.resolution=256"):
        trained("pixart", "distillation", 1, resolution=128)
