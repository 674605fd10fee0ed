"""Hostile files cannot run code, write elsewhere or fill the memory."""

import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from lcm.app.cli import build
from lcm.core.errors import UserError
from lcm.data.datamodule import ShardDataModule
from lcm.data.source import Source
from lcm.data.tar import Memory, headers
from lcm.evaluate.inception import check
from lcm.index import write_manifests
from lcm.models.pipeline import load_codec, load_network
from lcm.runtime.resume import resume_path
from tests.data.conftest import keys, pairs, png, stream, take, write_shard


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Yield a path that must not exist at the end of the test. First check that the traps work."""
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Trap(marker)))
    torch.save(Trap(marker), tmp_path / "trap")
    marker.unlink()
    torch.load(tmp_path / "trap", weights_only=False)
    marker.unlink()
    yield marker
    assert not marker.exists()


PARTS = {
    "unet": ("tiny", "diffusion_pytorch_model", load_network),
    "vae": ("tiny", "diffusion_pytorch_model", load_codec),
    "text_encoder": ("tiny", "pytorch_model", load_codec),
    "clip": ("tiny", "pytorch_model", lambda folder: build({"_target_": "lcm.evaluate.clip.mini_clip", "pipeline": folder})),
    "transformer": ("pixart", "diffusion_pytorch_model", load_network),
    "text_encoder_3": ("sd3", "pytorch_model", load_codec),
}


@pytest.mark.parametrize(
    ("part", "indexed"), [*((part, False) for part in PARTS), ("unet", True), ("vae", True), ("text_encoder_3", True)]
)
def test_a_pipeline_folder_with_pickled_weights_is_refused(
    part: str, indexed: bool, request: pytest.FixtureRequest, tmp_path: Path, marker: Path
) -> None:
    base, name, load = PARTS[part]
    folder = shutil.copytree(request.getfixturevalue(f"{base}_pipeline"), tmp_path / "teacher")
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    torch.save(Trap(marker), folder / part / f"{name}.bin")
    if indexed:
        index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": f"{name}.bin"}}
        stem = "model" if name == "pytorch_model" else name
        (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        save_file({}, folder / part / "more.safetensors")  # so that the libraries read the index
    with pytest.raises(UserError, match=r"cannot (load|build)"):
        load(str(folder))


@pytest.mark.parametrize("base", ["tiny", "pixart"])
def test_tokenizer_code_is_not_run(base: str, request: pytest.FixtureRequest, tmp_path: Path, marker: Path) -> None:
    folder = shutil.copytree(request.getfixturevalue(f"{base}_pipeline"), tmp_path / "teacher")
    file = folder / "tokenizer/tokenizer_config.json"
    config = {**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    file.write_text(json.dumps(config))
    (folder / "tokenizer/evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Tokenizer: ...\n")
    load_codec(str(folder))


def test_pickled_weights_of_inception_are_refused(tmp_path: Path, marker: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save(Trap(marker), tmp_path / "w.pth")
    with pytest.raises(UserError, match="not a file of weights only"):
        check(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("url", ["https://host/a.ckpt", "file:///tmp/a.ckpt"])
def test_remote_checkpoint_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="ckpt_path must be a local file"):
        resume_path(OmegaConf.create({"ckpt_path": url, "paths": {"run_dir": "runs"}}))


def data(shard: str, **options: Any) -> ShardDataModule:
    module = ShardDataModule([shard], resolution=8, num_workers=0, batch_size=4, **options)
    module.prepare_data()
    return module


def test_pickled_members_stay_bytes(tmp_path: Path, marker: Path) -> None:
    torch.save(Trap(marker), buffer := io.BytesIO())
    traps = {name: pickle.dumps(Trap(marker)) for name in ("pyd", "pickle", "pkl", "cls.pyd")} | {"pth": buffer.getvalue()}
    samples = [{**sample, **traps} for sample in pairs(0, 4)]
    batch = next(iter(data(write_shard(tmp_path / "a.tar", samples)).train_dataloader()))
    assert sorted(batch["captions"]) == [f"sample {i} of 0" for i in range(4)]


def hostile_tar(path: Path) -> str:
    """Write valid samples, one with an absolute name, among members whose extraction would write elsewhere."""
    with tarfile.open(path, "w") as tar:
        for stem in ("../../up", "sound/../../../around", str(path.parent / "absolute"), "sound/a", "sound/b"):
            for extension, content in (("png", png()), ("txt", b"text")):
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.CHRTYPE, "device.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return str(path)


def test_no_member_is_extracted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "deep/er"
    folder.mkdir(parents=True)
    shard = hostile_tar(folder / "a.tar")
    batch = next(iter(data(shard).train_dataloader()))
    inside = {key.removeprefix(f"{shard}/") for key in batch["keys"]}
    assert inside == {str(folder / "absolute").lstrip("/"), "sound/a", "sound/b"}
    for name in ("../../up", "sound/../../../around"):
        assert f"leaving out sample {name} of {shard}: name" in caplog.text
    assert write_manifests([(Source([shard]), 0)]) == []
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == {Path(shard), folder / "manifest.json"}


@pytest.mark.parametrize("size", [b"-0000002000\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 12], ids=repr)
def test_impossible_sizes_are_damage(size: bytes, tmp_path: Path) -> None:
    """A negative size would move the scan backwards. A huge size would move it beyond the end of any file."""
    shard = Path(write_shard(tmp_path / "a.tar", pairs(0, 3)))
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        start = tar.getmember("0-01.png").offset
    content[start + 124 : start + 136] = size
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    names = [member.name for member in headers(Memory(bytes(content)))]
    assert names == ["0-00.png", "0-00.txt", "0-01.txt", "0-02.png", "0-02.txt"]


def bomb(side: int) -> bytes:
    """Return a valid PNG with few bytes and many pixels."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def read(shard: str, answer: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    from lcm.data.transforms import Decode, collate

    sample_keys = keys(take(stream([shard], shuffle=0, decode=Decode(8), collate=collate)))
    answer.put((sample_keys, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


@pytest.mark.filterwarnings("ignore:Image size", "ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("side", [12_000, 16_000], ids=["Pillow warns", "Pillow refuses"])
def test_huge_picture_is_not_decoded(side: int, tmp_path: Path) -> None:
    """The decoded picture would take 432 or 768 MB. A separate process measures the peak of its memory."""
    samples = pairs(0, 8)
    samples[3]["png"] = bomb(side)
    shard = write_shard(tmp_path / "a.tar", samples)
    assert os.path.getsize(shard) < 2 * 2**20
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=read, args=(shard, answer))
    process.start()
    sample_keys, megabytes = answer.get(timeout=120)
    process.join()
    assert len(sample_keys) == 7
    assert f"{shard}/0-03" not in sample_keys
    assert megabytes < 150
