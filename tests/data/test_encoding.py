"""Shards of latents: their content, training on them, refused shards, and full disks."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds

from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.data.datamodule import ShardDataModule
from lcm.data.encoding import Encoder, Variants, collate_variants
from lcm.data.latents import DRAWN, POSTERIOR, TEXTS, DecodeLatents, stamp
from lcm.data.source import Source
from lcm.data.stream import PassStream
from lcm.data.transforms import Decode
from lcm.encode import claim, done_file, encode_shards
from lcm.models.codec import LatentCodec
from lcm.models.pipeline import load_codec
from lcm.models.text import TextEncoder
from tests.data.conftest import pairs, png, write_shard

Encode = Callable[..., Path]
SAMPLES = 9

STATES = TEXTS["states"][0]  # the member with the text embedding


@pytest.fixture(scope="module")
def codec(tiny_pipeline: Path) -> LatentCodec:
    return load_codec(str(tiny_pipeline))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Return a folder with a shard of OpenMoji pictures. Each picture has two captions."""
    folder = tmp_path_factory.mktemp("images")
    source = Source([str(next(shards.glob("train-*.tar")))])
    samples = [source.read(0, number) for number in range(min(source.notes(0).samples, SAMPLES))]
    for sample in samples:
        sample["json"] = {"blip": f"not {sample['txt'].decode()}"}
    write_shard(folder / "0.tar", samples)
    return folder


@pytest.fixture
def encode(tmp_path: Path, images: Path, codec: LatentCodec) -> Encode:
    """Return `encode(name, seed=0, drawn=False, text=False, captions=None)`, which writes latents and returns their folder."""

    def make(name: str = "latents", *, seed: int = 0, captions: Any = None, **content: bool) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        claim(folder, stamp(codec, 32, **content), 0)
        data = ShardDataModule(f"{images}/0.tar", codec=codec, resolution=32, num_workers=0, val_batch_size=4)
        encoder = Encoder(codec, seed, content.get("drawn", False), content.get("text", False))
        decode = Variants(Decode(32, captions=captions), 1, False)
        encoded([f"{images}/0.tar"], folder, encoder, decode, data)
        return folder

    return make


def encoded(urls: list[str], folder: Path, encoder: Encoder, decode: Variants, data: ShardDataModule) -> None:
    """Encode shards into a folder under their names, as `python -m lcm.encode` does."""
    source = Source(urls)
    options = {"batch_size": data.val_batch_size, "seed": data.seed, "by_shard": True}
    stream = PassStream(source, decode=decode, collate=collate_variants, **options)
    with torch.inference_mode():
        encode_shards(source, [folder / source.name(shard) for shard in range(len(urls))], stream, encoder, data)


def latents(folder: Path) -> list[dict[str, Any]]:
    source = Source([str(folder / "0.tar")], needs=DecodeLatents.needs)
    return [source.read(0, number) for number in range(source.notes(0).samples)]


def batch(codec: LatentCodec, folder: Path, **options: Any) -> LatentBatch:
    """Return a batch of all samples in their order. Another seed draws other samples of the posteriors."""
    options = {"resolution": 32, "num_workers": 0, "batch_size": SAMPLES, "shuffle": 0, **options}
    data = ShardDataModule(f"{folder}/0.tar", codec=codec, **options)
    data.prepare_data()
    return data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)


def test_latents_give_the_batches_of_their_images(codec: LatentCodec, images: Path, encode: Encode) -> None:
    options = {"caption_dropout": 0.4, "seed": 5}
    expected, result = batch(codec, images, **options), batch(codec, encode(), latents=True, **options)
    assert result.captions == expected.captions
    assert 0 < result.captions.count("") < SAMPLES
    torch.testing.assert_close(result.z0, expected.z0, rtol=2e-3, atol=2e-3)  # the latents are stored in float16
    assert torch.equal(result.cond["states"], expected.cond["states"])


def test_drawn_sample_is_of_the_posterior(codec: LatentCodec, encode: Encode) -> None:
    posterior, drawn = latents(encode()), encode("drawn", drawn=True)
    members = {POSTERIOR, DRAWN, *(name for name, _ in TEXTS.values())}
    assert [set(sample) & members for sample in latents(drawn)] == SAMPLES * [{DRAWN}]
    first, second = (batch(codec, drawn, latents=True, seed=seed) for seed in (1, 2))
    assert torch.equal(first.z0, second.z0)
    data = ShardDataModule(f"{drawn.parent}/latents/0.tar", codec=codec, latents=True, resolution=32)
    moments = torch.stack([data.decode(sample, random.Random(0))["moments"] for sample in posterior]).float()
    mean, std = moments.chunk(2, dim=1)
    noise = (first.z0 / codec.vae.config["scaling_factor"] - mean) / std
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1


def test_draws_are_a_function_of_seed_shard_and_key(codec: LatentCodec, encode: Encode) -> None:
    folders = [encode("a", drawn=True), encode("b", drawn=True), encode("c", drawn=True, seed=1)]
    first, same, other = ((folder / "0.tar").read_bytes() for folder in folders)
    assert first == same
    assert first != other


def test_stored_text_embeddings_replace_the_text_encoder(
    codec: LatentCodec, images: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = encode(text=True), {"caption_dropout": 0.4, "seed": 5}
    expected = batch(codec, images, **options)
    encoded: list[list[str]] = []
    plain = TextEncoder.__call__

    def counted(self: TextEncoder, captions: list[str], *device: torch.device) -> Any:
        encoded.append(captions)
        return plain(self, captions, *device)

    monkeypatch.setattr(TextEncoder, "__call__", counted)
    result = batch(codec, folder, latents=True, **options)
    assert encoded == [[""]]
    assert result.captions == expected.captions
    torch.testing.assert_close(result.cond["states"], expected.cond["states"], rtol=1e-3, atol=1e-3)


def test_dropped_caption_has_the_null_prompts_embedding(codec: LatentCodec, encode: Encode) -> None:
    result = batch(codec, encode(text=True), latents=True, caption_dropout=0.5, seed=5)
    assert 0 < result.captions.count("") < SAMPLES
    for caption, states in zip(result.captions, result.cond["states"], strict=True):
        assert torch.equal(states, result.uncond["states"][0]) == (caption == "")


def test_text_embeddings_are_of_the_chosen_caption(codec: LatentCodec, encode: Encode) -> None:
    result = batch(codec, encode(text=True, captions={"txt": 1, "blip": 1}), latents=True)
    assert 0 < sum(caption.startswith("not ") for caption in result.captions) < SAMPLES
    torch.testing.assert_close(result.cond["states"], codec.text(result.captions)["states"], rtol=1e-3, atol=1e-3)


def test_captions_are_refused_where_embeddings_are_stored(codec: LatentCodec, encode: Encode) -> None:
    batch(codec, encode(), latents=True, captions={"blip": 1})
    with pytest.raises(UserError, match=r"data\.captions has no effect: the latents in .* hold the text embeddings"):
        batch(codec, encode("text", text=True), latents=True, captions={"blip": 1})


@pytest.mark.parametrize(("content", "refused"), [({}, False), ({"text": True}, True)])
def test_embeddings_of_another_text_encoder_are_refused(
    tiny_pipeline: Path, encode: Encode, content: dict[str, bool], refused: bool
) -> None:
    folder, other = encode(**content), load_codec(str(tiny_pipeline))
    next(other.text.encoders[0].parameters()).add_(0.1)
    if refused:
        with pytest.raises(UserError, match=r"have text_encoder = ([0-9a-f]{12}), .* ask for (?!\1)[0-9a-f]{12}:"):
            batch(other, folder, latents=True)
    else:
        assert len(batch(other, folder, latents=True)) == SAMPLES


def test_folder_refuses_other_latents(encode: Encode) -> None:
    encode()
    for content in ({"drawn": True}, {"text": True}):
        with pytest.raises(UserError, match="holds latents of another VAE, size, crop or content"):
            encode(**content)


@pytest.mark.parametrize(("change", "says"), [({"resolution": 64}, "have resolution = 64")])
def test_latents_of_another_make_are_refused(codec: LatentCodec, encode: Encode, change: dict[str, Any], says: str) -> None:
    stamped = encode() / "latents.json"
    stamped.write_text(json.dumps({**json.loads(stamped.read_text()), **change}))
    with pytest.raises(UserError, match=says):
        batch(codec, stamped.parent, latents=True)


def test_damaged_array_costs_its_sample(codec: LatentCodec, encode: Encode) -> None:
    folder = encode(text=True)
    samples = list(latents(folder))
    samples[2][STATES], samples[4][POSTERIOR] = samples[2][STATES][:-8], b""
    write_shard(folder / "0.tar", samples)
    done_file(folder / "0.tar").unlink()
    data = ShardDataModule(f"{folder}/0.tar", codec=codec, latents=True, resolution=32, num_workers=0, batch_size=SAMPLES)
    data.prepare_data()
    assert next(iter(data.train_dataloader()))["skipped"] == {"latent": 2}


class FullDisk:
    """A file on a disk that has space for a number of bytes."""

    def __init__(self, file: Any, space: int) -> None:
        self.file, self.left = file, space

    def write(self, content: bytes) -> int:
        self.left -= len(content)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)


def test_full_disk_is_one_sentence_and_leaves_no_shard(encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = wds.TarWriter
    monkeypatch.setattr(wds, "TarWriter", lambda file, **options: writer(FullDisk(file, 12_000), **options))
    with pytest.raises(UserError, match=r"0\.tar cannot be written whole \(No space left on device\): make room") as caught:
        encode()
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert [file.name for file in (tmp_path / "latents").iterdir()] == ["latents.json"]
    assert len(latents(encode())) == SAMPLES


def test_partial_shard_is_written_anew(encode: Encode, tmp_path: Path) -> None:
    whole = (encode("whole") / "0.tar").read_bytes()
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents/0.partial").write_bytes(whole[: len(whole) // 2])
    folder = encode()
    assert (folder / "0.tar").read_bytes() == whole
    assert sorted(file.name for file in folder.iterdir()) == ["0.tar", "0_stats.json", "latents.json"]


@pytest.mark.parametrize("size", [(90, 61), (32, 57)])
def test_crop_of_a_mirrored_copy(size: tuple[int, int]) -> None:
    sample = {"__key__": "a", "__url__": "0.tar", "png": png(size), "txt": "a"}
    crops = set()
    for seed in range(20):
        variants = Variants(Decode(32, random_crop=True), 1, True)(sample, random.Random(seed))
        plain, mirrored = variants["sizes"].tolist()
        assert plain[:3] == mirrored[:3]
        resized = round(32 * size[0] / min(size))
        assert abs(plain[3] + 32 + mirrored[3] - resized) <= 1  # mirroring swaps left and right
        crops.add(plain[3])
    assert len(crops) > 3 or size[0] == min(size)


def test_samples_of_one_name_stay_apart(tmp_path: Path, codec: LatentCodec) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": key, "png": png(), "txt": key} for key in ("p.1", "p.2", "p.1")])
    claim(tmp_path, stamp(codec, 32, drawn=True), 0)
    data = ShardDataModule(f"{tmp_path}/0.tar", codec=codec, resolution=32, num_workers=0)
    (tmp_path / "latents").mkdir()
    encoded([f"{tmp_path}/0.tar"], tmp_path / "latents", Encoder(codec, 0, True, False), Variants(Decode(32), 1, False), data)
    samples = latents(tmp_path / "latents")
    assert [sample["txt"] for sample in samples] == [b"p.1", b"p.2", b"p.1"]
    assert len({sample["__key__"] for sample in samples}) == len({sample[DRAWN] for sample in samples}) == 3


def test_latents_are_alike_whatever_was_done_before(tmp_path: Path, codec: LatentCodec, capfd: pytest.CaptureFixture) -> None:
    """A resumed encoding may begin at another shard and have another number of workers."""
    urls = [
        write_shard(tmp_path / f"{n}.tar", [{**sample, "png": png((40, 32), n)} for sample in pairs(n, 7)]) for n in range(3)
    ]
    for done in (0, 1, 2):
        folder = tmp_path / f"latents-{done}"
        folder.mkdir()
        data = ShardDataModule(f"{tmp_path}/0.tar", codec=codec, resolution=32, num_workers=2 if done else 0, val_batch_size=4)
        decode = Variants(Decode(32, random_crop=True), 2, True)
        encoded(urls[done:], folder, Encoder(codec, 0, True, False), decode, data)
        for number in range(done, 3):
            assert (folder / f"{number}.tar").read_bytes() == (tmp_path / f"latents-0/{number}.tar").read_bytes()
            assert done_file(folder / f"{number}.tar").is_file()
    assert "images/s" in capfd.readouterr().err
