"""Training on encoded latents gives the losses of training on images that are encoded on the fly."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.e2e.test_resume import losses

pytestmark = pytest.mark.slow


@pytest.fixture
def encode(run, tiny_pipeline, shards):
    data = [f"data.shards={shards}/train-*.tar", f"data.val_shards={shards}/val-*.tar", "data.build=null", "data.resolution=32"]
    return lambda *more: run("lcm.encode", *data, f"data.codec.pipeline={tiny_pipeline}", "out=latents", *more)


@pytest.fixture
def latents(encode, tmp_path, tmp_path_factory):
    """Return a folder of latents. The first test encodes them, and later tests copy them."""
    encoded = tmp_path_factory.getbasetemp() / "encoded"
    if not encoded.exists():
        done = encode()
        assert done.returncode == 0, done.stderr
        shutil.copytree(tmp_path / "latents", encoded)
        return tmp_path / "latents"
    return Path(shutil.copytree(encoded, tmp_path / "latents"))


def without_data(tiny):
    return [arg for arg in tiny if not arg.startswith(("data.shards", "data.val_shards", "data.build"))]


def train(run, tiny, tmp_path, name, *more):
    done = run("train.py", *tiny, "data.codec.dtype=null", f"name={name}", *more)
    assert done.returncode == 0, done.stderr
    return {step: float(loss) for step, loss in losses(tmp_path / f"runs/{name}/0").items()}


def test_latents_train_as_their_images_do(run, latents, tiny, tmp_path):
    assert json.loads((latents / "train-00000_stats.json").read_text())["successes"] == 32
    assert not list(latents.glob("*.partial"))

    # The test uses one lane. Several lanes take turns by the sizes of their shards, and shards of latents have other sizes.
    data = ["data=latents", "data.shards=latents/train-*.tar", "data.val_shards=latents/val-*.tar", "+data.build=null"]
    options = ["data.codec.cache=false", "data.caption_dropout=0.3", "data.captions=null", "+data.lanes=1"]
    on_the_fly = train(run, tiny, tmp_path, "images", *options)
    encoded = train(run, without_data(tiny), tmp_path, "latents", *data, "data.caption_dropout=0.3", "data.lanes=1")
    assert encoded == pytest.approx(on_the_fly, rel=2e-3)  # the moments are stored in float16
    assert len(encoded) == 6


def test_folder_of_pictures_trains_and_encodes(run, tiny, tiny_pipeline, shards, tmp_path):
    with tarfile.open(shards / "train-00000.tar") as tar:
        tar.extractall(tmp_path / "pictures", filter="data")
    folder = ["data=folder", "data.folder=pictures", "data.resolution=32"]
    done = run("train.py", *without_data(tiny), *folder, "trainer.val_check_interval=null", "callbacks.samples.steps=[1]")
    assert done.returncode == 0, done.stderr
    done = run("lcm.encode", *folder, f"data.codec.pipeline={tiny_pipeline}", "out=latents")
    assert done.returncode == 0, done.stderr
    stats = [json.loads(file.read_text()) for file in (tmp_path / "latents").glob("*_stats.json")]
    assert sum(record["successes"] for record in stats) == 32


def test_encoding_goes_on_where_it_was_stopped(encode, latents):
    (latents / "train-00001_stats.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in latents.glob("*.tar")}
    again = encode()
    assert "1 of them new" in again.stdout
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"train-00001.tar"}


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        (["crops=2", "flip=true"], {"latent.npy": b"(4, 8, 8, 8)"}),
        (["sample=true", "text=true"], {"sample.npy": b"(1, 4, 8, 8)", "text.npy": b"(16, 16)"}),
    ],
)
def test_options_choose_the_stored_arrays(encode, tmp_path, options, heads):
    assert encode(*options, "data.val_shards=null").returncode == 0
    with tarfile.open(tmp_path / "latents/train-00000.tar") as tar:
        arrays = {name.partition(".")[2]: tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".npy")}
    assert arrays.keys() == heads.keys()
    assert all(head in arrays[name][:128] for name, head in heads.items())


def test_processes_share_out_the_shards(encode, tmp_path):
    for rank in (0, 1):
        assert encode(f"rank={rank}", "world_size=2").returncode == 0
    assert len(list((tmp_path / "latents").glob("*_stats.json"))) == len(list((tmp_path / "latents").glob("*.tar"))) > 2
