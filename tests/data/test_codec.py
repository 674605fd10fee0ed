"""The frozen VAE and text encoder: scaling, determinism, the cache, captions."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from lcm.core.random import generator
from lcm.data.source import Source
from lcm.data.transforms import Decode
from lcm.models.codec import LatentCodec, to_signed_range
from lcm.models.pipeline import load_codec
from tests.data.conftest import png, samples_of, write_shard

Encoded = Callable[..., tuple[LatentCodec, list[int]]]
X = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BATCH = {"x": X, "captions": ["red apple", "dog face", "", "rocket", "red apple"], "keys": list("abcde")}


@pytest.fixture(scope="module")
def codec(tiny_pipeline: Path) -> LatentCodec:
    return load_codec(str(tiny_pipeline))


@pytest.fixture(scope="module")
def vae(tiny_pipeline: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_pipeline, subfolder="vae").eval()


def count_encodings(codec: LatentCodec, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the batch size of each later call of the VAE's encoder."""
    sizes: list[int] = []
    encode = codec.vae.encode
    monkeypatch.setattr(codec.vae, "encode", lambda x: sizes.append(len(x)) or encode(x))
    return sizes


def test_z0_is_the_scaled_posterior(codec: LatentCodec, vae: AutoencoderKL) -> None:
    with torch.no_grad():
        posterior = vae.encode(X.float() / 127.5 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator("cpu", 7))
    expected = (posterior.mean + posterior.std * noise) * vae.config["scaling_factor"]
    torch.testing.assert_close(codec.encode(BATCH, generator("cpu", 7)).z0, expected)


def test_float_pixels_and_bytes_encode_alike(codec: LatentCodec) -> None:
    as_float = codec.encode({**BATCH, "x": to_signed_range(X)}, generator("cpu", 7))
    assert torch.equal(as_float.z0, codec.encode(BATCH, generator("cpu", 7)).z0)


def test_the_posterior_is_drawn_by_the_rng_alone(codec: LatentCodec) -> None:
    torch.manual_seed(0)
    first = codec.encode(BATCH, generator("cpu", 7)).z0
    torch.manual_seed(1)
    assert torch.equal(codec.encode(BATCH, generator("cpu", 7)).z0, first)
    assert not torch.equal(codec.encode(BATCH, generator("cpu", 8)).z0, first)


def test_a_batch_keeps_captions_and_keys(codec: LatentCodec) -> None:
    batch = codec.encode(BATCH)
    assert (batch.captions, batch.keys, len(batch)) == (BATCH["captions"], BATCH["keys"], 5)
    assert batch.z0.shape == (5, 4, 8, 8)
    assert batch.cond["states"].shape == (5, 16, 16)
    assert batch.uncond["states"].shape == (1, 16, 16)


def test_the_vaes_layout_is_its_own(codec: LatentCodec) -> None:
    """The codec returns contiguous latents. A UNet would keep the layout of channels_last latents."""
    assert codec.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    z0 = codec.encode(BATCH).z0
    assert z0.is_contiguous()
    assert codec.decode(z0).is_contiguous()


def test_chunks_bound_the_vae_batch_and_change_nothing(
    tiny_pipeline: Path, codec: LatentCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked = load_codec(str(tiny_pipeline), chunk=2)
    sizes = count_encodings(chunked, monkeypatch)
    torch.testing.assert_close(chunked.posterior(X, BATCH["keys"]), codec.posterior(X, BATCH["keys"]))
    assert sizes == [2, 2, 1]


def test_the_cache_answers_without_the_vae(tiny_pipeline: Path, codec: LatentCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = load_codec(str(tiny_pipeline), cache=True)
    sizes = count_encodings(cached, monkeypatch)
    first = cached.encode(BATCH, generator("cpu", 7))
    subset = {"x": X[[3, 1]], "captions": ["", ""], "keys": ["d", "b"]}
    assert torch.equal(cached.encode(BATCH, generator("cpu", 7)).z0, first.z0)  # a resumed run starts with an empty cache
    torch.testing.assert_close(
        cached.posterior(subset["x"], subset["keys"]), codec.posterior(X, BATCH["keys"])[[3, 1]], rtol=1e-3, atol=1e-4
    )
    assert sizes == [5]


def test_a_batch_with_news_is_encoded(tiny_pipeline: Path, codec: LatentCodec) -> None:
    cached = load_codec(str(tiny_pipeline), cache=True)
    cached.posterior(X[:2], ["a", "b"])
    posterior = cached.posterior(X[1:3], ["b", "c"])
    torch.testing.assert_close(posterior, codec.posterior(X, BATCH["keys"])[1:3], rtol=1e-3, atol=1e-4)


def test_without_a_cache_nothing_is_kept(codec: LatentCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_encodings(codec, monkeypatch)
    codec.encode(BATCH)
    codec.encode(BATCH)
    assert sizes == [5, 5]


def test_uncond_is_the_empty_caption(codec: LatentCodec) -> None:
    assert torch.equal(codec.encode(BATCH).uncond["states"], codec.text([""])["states"])
    torch.testing.assert_close(codec.encode(BATCH).cond["states"][2:3], codec.text([""])["states"])


def test_a_caption_encodes_alike_in_any_batch(tiny_pipeline: Path) -> None:
    plain = load_codec(str(tiny_pipeline), text_cache=0)
    torch.testing.assert_close(
        plain.text(["dog face", "a much longer caption of a rocket"])["states"][:1], plain.text(["dog face"])["states"]
    )


@pytest.fixture
def encoded(tiny_pipeline: Path) -> Encoded:
    """Return `encoded(**options)`, which makes a codec and a list of the batch sizes of its text encoder's calls."""

    def make(**options: Any) -> tuple[LatentCodec, list[int]]:
        codec, sizes = load_codec(str(tiny_pipeline), **options), []
        codec.text.encoders[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        return codec, sizes

    return make


def test_a_caption_is_encoded_once(encoded: Encoded) -> None:
    codec, sizes = encoded()
    first = codec.encode(BATCH)
    again = codec.encode({**BATCH, "captions": ["rocket", "red apple", "red apple", "sun", "dog face"]})
    assert sizes == [4, 1]  # "red apple" is encoded once, and the empty caption is the null prompt
    assert torch.equal(again.cond["states"][[0, 1, 2, 4]], first.cond["states"][[3, 0, 4, 1]])
    assert torch.equal(again.uncond["states"][0], first.cond["states"][2])


def test_cached_states_are_those_of_a_plain_encoding(encoded: Encoded) -> None:
    """The embeddings are bit-equal on the tested CPUs. On other CPUs a row of a product may depend on the number of rows."""
    (codec, _), (plain, sizes) = encoded(), encoded(text_cache=0)
    codec.text(["rocket", "sun"])["states"]
    captions = ["dog face", "sun", "a cat", "rocket"]
    for _ in range(2):
        expected = plain.text(captions)["states"]
        torch.testing.assert_close(codec.text(captions)["states"], expected, rtol=1e-6, atol=1e-6)
    assert sizes == [4, 4]


def test_text_cache_is_bounded_and_drops_the_oldest(
    encoded: Encoded,
) -> None:
    codec, _ = encoded(text_cache=2.5 * 16 * 16 * 4 / 1e6)  # room for two captions
    codec.text(["a", "b"])["states"]
    codec.text(["a"])["states"]
    codec.text(["c"])["states"]
    assert list(codec.text.cache) == ["a", "c"]
    assert codec.text(list("defgd"))["states"].shape == (5, 16, 16)  # more captions than the cache holds
    assert list(codec.text.cache) == ["g", "d"]
    assert all(states.untyped_storage().nbytes() == states.nbytes for [states] in codec.text.cache.values())


def test_text_states_move_with_the_codec(encoded: Encoded) -> None:
    codec, _ = encoded()
    codec.text(["a", "b"])["states"]
    assert [states.device.type for [states] in codec.to("meta").text.cache.values()] == ["meta", "meta"]


def test_training_reuses_encodings_of_validation(encoded: Encoded) -> None:
    codec, _ = encoded()
    with torch.inference_mode():
        codec.encode(BATCH)
    batch, weight = codec.encode(BATCH), torch.ones(16, requires_grad=True)
    ((batch.cond["states"] + batch.uncond["states"]) * weight).sum().backward()
    assert weight.grad is not None


def test_long_captions_are_cut_with_the_end_kept(tiny_pipeline: Path) -> None:
    codec = load_codec(str(tiny_pipeline))
    seen: list[torch.Tensor] = []
    hook = codec.text.encoders[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    codec.text(["red apple " * 50, "dog"])["states"]
    hook.remove()
    assert seen[0].shape == (2, 16)
    assert (seen[0][:, -1] == codec.text.tokenizers[0].eos_token_id).all()
    assert (seen[0][0, 1:-1] != codec.text.tokenizers[0].eos_token_id).all()


def test_decoding_undoes_the_scaling(codec: LatentCodec, vae: AutoencoderKL) -> None:
    z0 = codec.encode(BATCH, generator("cpu", 7)).z0
    with torch.no_grad():
        laid_out = copy.deepcopy(vae)
        laid_out.decoder.to(memory_format=torch.channels_last)  # the codec's layout, which gives the same order of sums
        x = laid_out.decode(z0 / vae.config["scaling_factor"]).sample
    assert torch.equal(codec.decode(z0), ((x.clamp(-1, 1) + 1) * 127.5).round().byte())


def test_wild_latents_decode_to_all_bytes(codec: LatentCodec) -> None:
    x = codec.decode(1000 * torch.randn(2, 4, 8, 8, generator=generator("cpu", 0)))
    assert (x.dtype, x.shape) == (torch.uint8, (2, 3, 32, 32))
    assert (x.min(), x.max()) == (0, 255)


def test_bfloat16_networks_give_float32_batches(tiny_pipeline: Path, codec: LatentCodec) -> None:
    low = load_codec(str(tiny_pipeline), dtype="bfloat16")
    batch, exact = low.encode(BATCH, generator("cpu", 7)), codec.encode(BATCH, generator("cpu", 7))
    assert low.vae.dtype == low.text.encoders[0].dtype == torch.bfloat16
    assert batch.z0.dtype == batch.cond["states"].dtype == batch.uncond["states"].dtype == torch.float32
    assert (batch.z0 - exact.z0).std() < 0.03 * exact.z0.std()
    assert (batch.cond["states"] - exact.cond["states"]).std() < 0.03 * exact.cond["states"].std()
    assert low.decode(batch.z0).dtype == torch.uint8


def test_the_networks_are_frozen(codec: LatentCodec) -> None:
    assert not any(p.requires_grad for net in (codec.vae, codec.text.encoders[0]) for p in net.parameters())
    assert not codec.vae.training
    assert not codec.text.encoders[0].training


def test_cache_tells_samples_of_one_name_apart(tiny_pipeline: Path, tmp_path: Path) -> None:
    colours = ("red", "green", "blue")
    pictures = [{"__key__": key, "png": png(colour=colour), "txt": colour} for key, colour in zip("aba", colours, strict=True)]
    samples = [
        Decode(32)(sample, random.Random(0)) for sample in samples_of(Source([write_shard(tmp_path / "a.tar", pictures)]))
    ]
    codec = load_codec(str(tiny_pipeline), cache=True)
    first, _, last = (codec.posterior(sample["x"][None], [sample["key"]]) for sample in samples)
    assert not torch.equal(first, last)


@pytest.mark.parametrize(
    ("batch", "vae", "text"), [(["x"], "meta", "meta"), (["moments"], "cpu", "meta"), (["moments", "states"], "cpu", "cpu")]
)
def test_only_what_encodes_the_batch_is_on_its_device(batch: list[str], vae: str, text: str, tiny_pipeline: Path) -> None:
    codec = load_codec(str(tiny_pipeline))
    codec.place(torch.device("meta"), dict.fromkeys(batch))
    assert (codec.vae.device.type, codec.text.device.type) == (vae, text)
    assert codec.text([""], torch.device("meta"))["states"].device.type == "meta"
