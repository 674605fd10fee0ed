"""The benchmarks run on tiny settings, and their columns have the right quantities. No test asserts a speed."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from lcm.bench import data, memory, peers, quality, sampling, step
from lcm.bench.measure import Table, in_turn, machine
from lcm.bench.shards import photo
from lcm.core.random import generator
from lcm.models.families.sd import StableDiffusion


def check(table: Table) -> None:
    """Check that the table is rectangular and that every number is finite."""
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == len(table.rows) + 2
    assert {line.count("|") for line in lines} == {len(table.rows[0]) + 1}
    numbers = [value for row in table.rows for value in row.values() if isinstance(value, float)]
    assert numbers
    assert np.isfinite(numbers).all()


def test_reading_is_measured(tiny_pipeline: Path, shards: Path):
    options = {"photo_size": 64, "photo_resolution": 32, "photos": 8, "batch_size": 4, "workers": 1}
    table = data.measure(
        shards=f"{shards}/train-*.tar", pipeline=str(tiny_pipeline), resolution=32, seconds=0.01, repeats=1, **options
    )
    check(table)
    assert len(table.rows) == 4
    assert min(row[name] for row in table.rows for name in ("images/s a core", "of the peers' rate", "images/s, 1 workers")) > 0


@pytest.mark.slow
def test_steps_are_measured(tiny_pipeline: Path, shards: Path):
    batch = ["data.batch_size=4", "trainer.precision=32-true", "data.num_workers=0"]
    lcd = ["experiment=lcd_mini", f"model.pipeline={tiny_pipeline}", "model.guidance_lr_multiplier=1", *batch]
    teacher = ["experiment=teacher_mini", f"model.pipeline={tiny_pipeline}", "model/net=pipeline", *batch]
    table = step.measure(
        shards=f"{shards}/train-*.tar",
        resolution=32,
        experiments={"lcd": lcd, "teacher": teacher},
        ways={"each time": {"data": "images"}, "cached": {"data": "cached"}, "latents": {"data": "latents"}},
        peers_of="lcd",
        peer_precisions=["float32", "bfloat16"],
        steps=1,
        repeats=1,
        matmul_size=16,
    )
    check(table)
    assert [row["training"] for row in table.rows] == ["lcd"] * 5 + ["teacher"] * 3
    flop = {row["training"]: row["TFLOP/s"] / row["images/s"] for row in table.rows if row["TFLOP/s"]}
    assert flop["lcd"] / flop["teacher"] == pytest.approx(2, rel=0.05)  # 6 forwards of a UNet to 3


@pytest.mark.slow
def test_quality_is_measured_at_the_given_minutes(tiny_pipeline: Path, shards: Path, tmp_path: Path):
    """Every recipe has a row for each time. Its students differ, because the training continues."""
    base = ["experiment=lcd_mini", f"model.pipeline={tiny_pipeline}", f"data.shards={shards}/train-*.tar", "data.resolution=32"]
    base += ["data.batch_size=4", "data.num_workers=0", "trainer.precision=32-true", "model.guidance_lr_multiplier=1"]
    table = quality.measure(
        base=[*base, "++data.val_shards=null", "++data.build=null", "++data.index=null"],
        ours={"ours": [], "larger steps": ["model.optimizer.lr=0.01"]},
        peers=["model.w_min=5", "model.w_max=15"],
        learning_rates=[1e-2],
        minutes=[1e-5, 2e-5],
        steps=1,
        shards=f"{shards}/val-*.tar",
        captions={"txt": 1.0},
        resolution=32,
        samples=4,
        w=[6.0],
        cache=str(tmp_path),
    )
    check(table)
    assert [row["recipe"] for row in table.rows] == ["ours"] * 2 + ["larger steps"] * 2 + ["diffusers' script, lr 0.01"] * 2
    assert [row["minutes"] for row in table.rows] == [1e-5, 2e-5] * 3
    assert len({row["FID"] for row in table.rows}) == 6
    assert table.picture is not None


def test_sampling_matches_diffusers(tiny_pipeline: Path):
    options = {"w": 4.0, "steps": [2], "batch_sizes": [3], "repeats": 1, "device": "cpu", "compile": False, "openvino": False}
    table = sampling.measure(pipeline=str(tiny_pipeline), prompt="red apple", **options)
    check(table)
    assert {row["sampler"]: row["largest difference"] for row in table.rows}["ours, float32"] <= 1


def test_two_passes_of_the_peers_equal_one():
    z, t, cond = torch.randn(6, 4, 2, 2), torch.arange(6), {"states": torch.randn(6, 3, 5)}
    passes = []

    def net(z: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], w: None) -> torch.Tensor:
        passes.append(len(z))
        return z * t.view(-1, 1, 1, 1) + cond["states"].sum((1, 2)).view(-1, 1, 1, 1)

    assert torch.equal(peers.two_passes(net)(z, t, cond), net(z, t, cond, None))
    assert passes == [3, 3, 6]


def test_pixels_of_the_peers_equal_torchvision():
    tv = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))
    torch.manual_seed(0)
    ours = peers.as_tensor(image, 32)
    torch.manual_seed(0)
    resized = tv.functional.resize(image, 32, interpolation=tv.InterpolationMode.BILINEAR)
    left, top = (int(torch.randint(side - 32 + 1, ())) for side in resized.size)
    theirs = tv.functional.normalize(tv.functional.to_tensor(tv.functional.crop(resized, top, left, 32, 32)), [0.5], [0.5])
    assert torch.equal(ours, theirs)


def test_synthetic_photos_have_the_bytes_of_photos():
    """A camera's picture takes about 2 bits per pixel at this quality."""
    assert 1.0 < 8 * len(photo(256, generator("cpu", 0))) / 256**2 < 4.0


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ("speed", r"parts=speed is not a list: write parts=\[speed\]"),
        (
            "[data,speed]",
            "parts=speed does not exist: choose among memory, data, start, rate, step, quality",
        ),
    ],
)
def test_unknown_part_is_refused(parts: str, says: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["bench", f"parts={parts}", "dataset=null"])
    with pytest.raises(SystemExit, match=says):
        importlib.import_module("lcm.bench.__main__").main()


def test_contenders_take_turns():
    order: list[str] = []
    results = in_turn({"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b") or len(order)}, 2)
    assert (order, results) == (["a", "b", "a", "b"], {"a": [1, 3], "b": [2, 4]})


def test_machine_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("lcm.bench.measure.Path", lambda path: tmp_path / path.lstrip("/"))
    assert machine()["cpu"]


UNET = {
    "sample_size": 16,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def test_memory_is_counted_on_shapes():
    check(memory.measure(networks={"tiny": UNET}, batch_sizes={"tiny": 2}, gpus=2))
    ddp, fsdp = memory.states(UNET, "ddp", 2), memory.states(UNET, "fsdp", 2)
    assert ddp["AdamW"] == 8 * StableDiffusion({}, {}).with_w(UNet2DConditionModel(**UNET)).num_parameters()
    assert all(fsdp[name] <= 0.52 * ddp[name] for name in ("student", "gradients", "AdamW", "target", "teacher"))


def test_activations_cover_the_inputs_of_convolutions():
    """The estimate is in bfloat16. It grows linearly with the batch, and recomputing blocks more than halves it."""
    size = {
        (batch, recomputed): memory.activations(UNET, batch, checkpointing=recomputed).all
        for batch in (1, 2, 3)
        for recomputed in (False, True)
    }
    for recomputed in (False, True):
        assert size[3, recomputed] - size[2, recomputed] == size[2, recomputed] - size[1, recomputed] > 0
    assert size[2, True] < 0.5 * size[2, False]
    kept = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal kept
        kept += 2 * inputs[0].numel()

    unet = UNet2DConditionModel(**UNET)
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(count)
    unet(torch.zeros(2, 4, 16, 16), torch.zeros(2, dtype=torch.long), torch.zeros(2, 77, 16))
    assert kept < size[2, False] < 12 * kept
