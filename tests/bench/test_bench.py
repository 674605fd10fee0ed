"""The measurements run on tiny settings and say what they claim; how fast anything is, no test asks."""

import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from lcm.bench import components, data, memory, peers, sampling, scaling, soak, step
from lcm.bench.measure import Table, in_turn, machine
from lcm.bench.shards import photo
from lcm.core.errors import UserError
from lcm.core.random import generator
from lcm.models.families.sd import StableDiffusion


def check(table: Table) -> None:
    """One line a row, as many cells as columns; every figure is finite and not negative."""
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
    assert min(row["images/s a core (CPU time)"] for row in table.rows) > 0
    assert sum("ours" in row["pipeline"] for row in table.rows) == 6


def test_memory_is_measured(tiny_pipeline: Path, shards: Path):
    options = {"photo_size": 64, "photos": 8, "samples": 96, "batch_size": 4}
    table = soak.measure(shards=f"{shards}/train-*.tar", pipeline=str(tiny_pipeline), resolution=32, **options)
    check(table)
    assert [row["samples an epoch"] for row in table.rows][1:] == [8, 32]
    assert all(row["MB at first"] > 50 for row in table.rows)


def test_the_slope_is_that_of_the_memory_after_the_warm_up():
    read = np.arange(0, 100_000, 500)
    memory = np.where(read < 20_000, read / 100, 200 + 3e-5 * read)
    assert soak.slope(read, memory) * 1e5 == pytest.approx(3.0)


@pytest.mark.slow
def test_steps_are_measured(tiny_pipeline: Path, shards: Path):
    batch = ["data.batch_size=4", "trainer.precision=32-true", "data.num_workers=0", "model.guidance_lr_multiplier=1"]
    lcd = ["experiment=lcd_mini", f"model.pipeline={tiny_pipeline}", *batch]
    net = [f"model.pipeline={tiny_pipeline}", "model/net=pipeline"]
    teacher = ["experiment=teacher_mini", *net, *batch[:-1]]
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
    flop = {row["training"]: row["GFLOP an image"] for row in table.rows}
    assert flop["lcd"] / flop["teacher"] == pytest.approx(2, rel=0.05)  # 6 forwards of a UNet for 3


@pytest.mark.slow
def test_scaling_is_measured(tiny_pipeline: Path, shards: Path):
    options = [f"model.pipeline={tiny_pipeline}", "data.batch_size=4", "data.num_workers=0"]
    experiment = ["experiment=lcd_mini", "trainer=ddp", "trainer.accelerator=cpu", *options]
    train = f"{shards}/train-*.tar"
    table = scaling.measure(experiment=experiment, shards=train, resolution=32, processes=[1, 2], threads=1, steps=4, repeats=1)
    check(table)
    assert [row["processes"] for row in table.rows] == [1, 2]
    assert table.rows[0]["of as many single ones"] == 1
    with pytest.raises(UserError, match=r"training with 1 processes failed: error: data\.batch_size=0"):
        scaling.rate([*experiment, "data.batch_size=0"], 1, 1, 2)


@pytest.mark.parametrize(("mu", "rows"), [(0.95, 11), (0, 10)])
def test_the_parts_of_a_step_are_measured(tiny_pipeline: Path, mu: float, rows: int):
    small = ["data.batch_size=2", "trainer.precision=32-true", f"model.ema_decay={mu}"]
    experiment = [f"model.pipeline={tiny_pipeline}", *small]
    table = components.measure(experiment=experiment, resolution=32, caption="red apple", repeats=1, matmul_size=64)
    check(table)
    assert len(table.rows) == rows
    assert {row["part"]: row["% of the step"] for row in table.rows}["the whole step"] == 100


def test_sampling_is_measured_and_both_make_the_same_images(tiny_pipeline: Path):
    table = sampling.measure(
        pipeline=str(tiny_pipeline),
        prompt="red apple",
        w=4.0,
        steps=[2],
        batch_sizes=[3],
        repeats=1,
        device="cpu",
        compile=False,
    )
    check(table)
    assert {row["sampler"]: row["largest difference"] for row in table.rows}["ours, float32"] <= 1


def test_the_peers_two_passes_are_our_one():
    z, t, cond = torch.randn(6, 4, 2, 2), torch.arange(6), {"states": torch.randn(6, 3, 5)}
    passes = []

    def net(z: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], w: None) -> torch.Tensor:
        passes.append(len(z))
        return z * t.view(-1, 1, 1, 1) + cond["states"].sum((1, 2)).view(-1, 1, 1, 1)

    assert torch.equal(peers.twice(net)(z, t, cond), net(z, t, cond, None))
    assert passes == [3, 3, 6]


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (48, 48)])
def test_the_peers_pixels_are_torchvision_s(size: tuple[int, int]):
    tv = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    torch.manual_seed(0)
    ours = peers.as_tensor(image, 32, Image.Resampling.BILINEAR)
    torch.manual_seed(0)
    resized = tv.functional.resize(image, 32, interpolation=tv.InterpolationMode.BILINEAR)
    left, top = (int(torch.randint(side - 32 + 1, ())) for side in resized.size)
    theirs = tv.functional.normalize(tv.functional.to_tensor(tv.functional.crop(resized, top, left, 32, 32)), [0.5], [0.5])
    assert torch.equal(ours, theirs)


def test_photos_are_as_hard_to_decode_as_photos():
    """About 2 bits a pixel, which is what a camera's picture takes at this quality."""
    assert 1.0 < 8 * len(photo(256, generator("cpu", 0))) / 256**2 < 4.0


def test_contenders_take_turns():
    order: list[str] = []
    found = in_turn({"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b") or len(order)}, 2)
    assert (order, found) == (["a", "b", "a", "b"], {"a": [1, 3], "b": [2, 4]})


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
    table = memory.measure(networks={"tiny": UNET}, batch_sizes={"tiny": 2}, gpus=2)
    check(table)
    ddp, _, fsdp, alone = table.rows
    count = StableDiffusion({}, {}).with_w(UNet2DConditionModel(**UNET)).num_parameters()
    assert ddp["AdamW"] * memory.GIB == 8 * count
    assert all(fsdp[name] <= 0.52 * ddp[name] for name in ("student", "gradients", "AdamW", "target", "teacher"))
    assert fsdp["states"] - alone["states"] == pytest.approx(fsdp["target"])


def test_activations_hold_what_a_real_forward_pass_feeds_its_convolutions():
    """In bfloat16; without the blocks' inner ones, much less; alike for each image."""
    size = {
        (batch, recomputed): memory.activations(UNET, batch, checkpointing=recomputed)
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


def test_a_machine_without_proc_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lcm.bench.measure.Path", lambda path: tmp_path / path.lstrip("/"))
    assert machine()["cpu"] == platform.machine()
