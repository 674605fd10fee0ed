"""Stable Diffusion XL: two text encoders, pooled text embeddings, sizes, and samples that equal those of diffusers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline

from lcm.core import sampling
from lcm.core.errors import UserError
from lcm.core.random import ImageNoise, generator
from lcm.data.datamodule import ShardDataModule
from lcm.data.encoding import Encoder, Variants, collate_variants
from lcm.data.latents import stamp
from lcm.data.source import Source
from lcm.data.stream import PassStream
from lcm.data.transforms import Decode
from lcm.encode import claim, encode_shards
from lcm.models.codec import LatentCodec
from lcm.models.pipeline import load_codec, load_family, load_network, read_lcm_json
from lcm.models.student import as_network
from lcm.models.text_to_image import TextToImage
from tests.data.conftest import png, write_shard
from tests.modules.conftest import new_module

PROMPTS, SEEDS = ["red apple on a white background", "rocket"], [3, 11]
X = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BATCH = {"x": X, "captions": ["red apple", "", "rocket"], "keys": list("abc")}
SIZES = {"original_sizes": torch.tensor([[64, 48], [32, 32], [900, 1200]]), "crops": torch.tensor([[5, 0], [0, 0], [0, 7]])}


@pytest.fixture(scope="module")
def codec(xl_pipeline: Path) -> LatentCodec:
    return load_codec(str(xl_pipeline))


def opened(folder: Any) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.std()))


def test_texts_match_diffusers(codec: LatentCodec, xl_pipeline: Path) -> None:
    states, no_states, pooled, not_pooled = opened(xl_pipeline).encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    cond, uncond = codec.conditions(PROMPTS, torch.zeros(2, 4, 8, 8))
    torch.testing.assert_close(cond["states"], states)
    torch.testing.assert_close(cond["pooled"], pooled)
    assert not no_states.any()
    assert not not_pooled.any()
    torch.testing.assert_close(uncond["states"].expand_as(states), no_states)
    torch.testing.assert_close(uncond["pooled"].expand_as(pooled), not_pooled)
    assert cond["states"].std() > 0.1
    assert cond["pooled"].std() > 0.01


def test_null_prompt_follows_the_folder(xl_pipeline: Path, tmp_path: Path) -> None:
    new_module(xl_pipeline, "diffusion").save_model(str(tmp_path / "a"))
    index = json.loads((tmp_path / "a/model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True
    (tmp_path / "a/model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    _, null, _, pooled = opened(tmp_path / "a").encode_prompt("rocket", negative_prompt="", do_classifier_free_guidance=True)
    _, uncond = load_codec(str(tmp_path / "a")).conditions(["rocket"], torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(uncond["states"], null)
    torch.testing.assert_close(uncond["pooled"], pooled)


def test_sizes_come_from_the_batch(codec: LatentCodec) -> None:
    batch = codec.encode({**BATCH, **SIZES})
    assert batch.cond["sizes"].tolist() == [[64, 48, 5, 0, 32, 32], [32, 32, 0, 0, 32, 32], [900, 1200, 0, 7, 32, 32]]
    assert torch.equal(batch.uncond["sizes"], batch.cond["sizes"])
    assert codec.encode(BATCH).cond["sizes"].tolist() == 3 * [[32, 32, 0, 0, 32, 32]]
    assert batch.cond["sizes"].dtype == torch.int64  # bfloat16 would round 1023 to 1024


def test_texts_and_sizes_reach_the_network(codec: LatentCodec, xl_pipeline: Path) -> None:
    net, cond = as_network(codec.text.family, load_network(str(xl_pipeline))), codec.encode({**BATCH, **SIZES}).cond
    z, t = torch.randn(3, 4, 8, 8, generator=generator("cpu", 0)), torch.tensor([500, 500, 500])
    with torch.no_grad():
        output = net(z, t, cond)
        assert set(cond) == {"states", "pooled", "sizes"}
        for part, rows in cond.items():
            changed = {**cond, part: rows.flip(0)}
            different = (net(z, t, changed) - output).abs().amax(dim=(1, 2, 3))
            assert (different[[0, 2]] > 1e-4).all(), part
            assert different[1] < 1e-6, part  # the flip keeps the middle row


@pytest.mark.parametrize("of_xl", [True, False])
def test_other_text_encoders_are_refused(of_xl: bool, codec: LatentCodec, xl_pipeline: Path, tiny_pipeline: Path) -> None:
    folder, texts = (xl_pipeline, load_codec(str(tiny_pipeline))) if of_xl else (tiny_pipeline, codec)
    reads, gives = ("pooled, sizes, states of width 40", "states of width 16")[:: 1 if of_xl else -1]
    z, net = torch.zeros(1, 4, 8, 8), as_network(load_family(str(folder)), load_network(str(folder)))
    with pytest.raises(UserError, match=f"expects {reads}, but the text encoders give {gives}: set data.codec.pipeline"):
        net(z, torch.tensor([1]), texts.conditions(["a"], z)[0])


def test_xl_teacher_matches_diffusers(xl_pipeline: Path) -> None:
    options = {"guidance_scale": 1.0, "num_inference_steps": 5, "latents": ImageNoise(SEEDS, (4, 8, 8))()}
    theirs = opened(xl_pipeline)(PROMPTS, output_type="latent", **options).images
    alike(TextToImage.load(str(xl_pipeline)).latents(PROMPTS, SEEDS, steps=5, w=0.0, sampler=sampling.ddim), theirs)


def test_teacher_gets_the_sampled_size(xl_pipeline: Path) -> None:
    """The pipeline of diffusers gives its UNet the height and width of the image, also as the original size."""
    noise = ImageNoise(SEEDS, (4, 12, 6))()
    options = {"guidance_scale": 4.0, "num_inference_steps": 2, "latents": noise, "height": 48, "width": 24}
    theirs = opened(xl_pipeline)(PROMPTS, output_type="latent", **options).images
    model = TextToImage.load(str(xl_pipeline))
    alike(model.latents(PROMPTS, SEEDS, steps=2, w=3.0, sampler=sampling.ddim, size=(48, 24)), theirs)


def test_xl_student_matches_diffusers(
    xl_pipeline: Path,
    codec: LatentCodec,
    data: Any,
    fit: Any,
    tmp_path: Path,
) -> None:
    module = new_module(xl_pipeline, "distillation", zero_init=False)
    before = [p.detach().clone() for p in module.net.parameters()]
    fit(module, data(codec=codec), 2)
    names = [name for (name, p), old in zip(module.net.named_parameters(), before, strict=True) if not torch.equal(p, old)]
    assert {"add_embedding.linear_1.weight", "time_embedding.cond_proj.weight"} <= set(names)
    module.save_model(str(tmp_path / "model"), dtype=torch.float32)
    assert read_lcm_json(str(tmp_path / "model"))["w_max"] == 14
    pipe = opened(tmp_path / "model")
    assert isinstance(pipe.scheduler, LCMScheduler)
    options = {"guidance_scale": 8.0, "num_inference_steps": 4, "generator": ImageNoise(SEEDS, (4, 8, 8)).generators}
    theirs = pipe(PROMPTS, output_type="latent", **options).images
    alike(TextToImage.load(str(tmp_path / "model")).latents(PROMPTS, SEEDS, steps=4, w=7.0), theirs)


def test_xl_adapters_match_diffusers(xl_pipeline: Path, codec: LatentCodec, data: Any, fit: Any, tmp_path: Path) -> None:
    module = new_module(xl_pipeline, "lora", lr=0.05)
    fit(module, data(codec=codec), 2)
    module.save_model(str(tmp_path / "model"), dtype=torch.float32)
    pipe = opened(xl_pipeline)
    pipe.load_lora_weights(tmp_path / "model")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    options = {"guidance_scale": 1.0, "num_inference_steps": 2, "generator": ImageNoise(SEEDS, (4, 8, 8)).generators}
    theirs = pipe(PROMPTS, output_type="latent", **options).images
    alike(TextToImage.load(str(tmp_path / "model")).latents(PROMPTS, SEEDS, steps=2, w=0), theirs)


def test_latent_shards_equal_image_shards(codec: LatentCodec, tmp_path: Path) -> None:
    """Text embeddings, original sizes and crops are equal too."""
    sizes = [(48, 40), (64, 32), (32, 50)]
    write_shard(
        tmp_path / "0.tar", [{"__key__": str(i), "png": png(size), "txt": f"rocket {i}"} for i, size in enumerate(sizes)]
    )
    (tmp_path / "latents").mkdir()
    claim(tmp_path / "latents", stamp(codec, 32, text=True), 0)
    images = ShardDataModule(f"{tmp_path}/0.tar", codec=codec, resolution=32, num_workers=0, batch_size=3, shuffle=0)
    with torch.inference_mode():
        encoder, decode = Encoder(codec, 0, False, True), Variants(Decode(32), 1, False)
        source = Source([f"{tmp_path}/0.tar"])
        stream = PassStream(source, decode=decode, collate=collate_variants, batch_size=64, by_shard=True)
        encode_shards(source, [tmp_path / "latents/0.tar"], stream, encoder, images)
    shard = f"{tmp_path}/latents/0.tar"
    latents = ShardDataModule(shard, codec=codec, resolution=32, num_workers=0, batch_size=3, shuffle=0, latents=True)
    batches = []
    for source in (images, latents):
        source.prepare_data()
        batches.append(source.on_after_batch_transfer(next(iter(source.train_dataloader())), 0))
    expected, result = batches
    assert result.captions == expected.captions
    assert torch.equal(result.cond["sizes"], expected.cond["sizes"])
    assert expected.cond["sizes"].unique(dim=0).shape == (3, 6)
    for part in ("states", "pooled"):
        torch.testing.assert_close(result.cond[part], expected.cond[part], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(result.z0, expected.z0, rtol=2e-3, atol=5e-3)
