"""The sampling program, run as a user runs it: files, output, resuming and errors."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lcm.app.pipelines import find_pipeline
from lcm.core.errors import UserError
from lcm.models.lora import kohya_weights, with_adapters
from lcm.models.pipeline import load_family, load_network
from tests.e2e.test_errors import complaint
from tests.models.conftest import save_student, save_teacher


@pytest.fixture
def runs(tiny_pipeline, tmp_path):
    """Write the runs of a student and of a newer teacher. Return their folder."""
    for time, name in enumerate(("student", "teacher")):
        folder = tmp_path / f"runs/{name}/0/model"
        folder.parent.mkdir(parents=True)
        if name == "student":
            save_student(folder, tiny_pipeline)
        else:
            save_teacher(folder, load_network(str(tiny_pipeline)), tiny_pipeline)
        os.utime(folder / "model_index.json", (time, time))
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "found"), [("last", "student"), ("last:teacher", "teacher"), ("last:student", "student"), ("mini", None)]
)
def test_last_is_the_newest_student_before_a_teacher(name, found, runs):
    assert find_pipeline(name, str(runs)) == (f"{runs}/{found}/0/model" if found else "mini")


def test_guided_distillations_students_are_students_and_a_teacher_is_better_than_nothing(runs):
    shutil.rmtree(runs / "student")
    assert find_pipeline("last", str(runs)) == f"{runs}/teacher/0/model"
    shutil.copytree(runs / "teacher", runs / "guided")
    (runs / "guided/0/model/lcm.json").write_text(json.dumps({"students": [2, 1]}))
    os.utime(runs / "guided/0/model/model_index.json", (0, 0))
    assert find_pipeline("last", str(runs)) == f"{runs}/guided/0/model"
    shutil.rmtree(runs)
    with pytest.raises(UserError, match="has saved a model: train one"):
        find_pipeline("last", str(runs))


def test_one_warning_for_all_prompts_of_one_w(run, runs):
    metadata = runs / "student/0/model/lcm.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "w_min": 2, "w_max": 14}))
    done = run("sample.py", "prompts=[cat,dog,cow]", "w=20", "steps=1", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("outside the range [2, 14]") == 1


def test_each_call_has_its_folder_and_draws_nothing_twice(run, runs, tmp_path):
    call = ["images_per_prompt=2", "steps=2", "device=cpu"]
    first = run("sample.py", "prompts=[cat,dog]", *call)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("model:   runs/student/0/model\n")
    assert "images:  outputs/sample/0/00000.png to 00003.png\ngrid:    outputs/sample/0/grid.png" in first.stdout
    files = sorted((tmp_path / "outputs/sample/0").iterdir())
    before = [file.read_bytes() for file in files]
    modified = files[0].stat().st_mtime_ns
    files[2].unlink()  # as if a kill had stopped the first call before this file

    again = run("sample.py", "prompts=[cat,dog]", *call)
    assert "00003.png (3 were there)" in again.stdout
    assert [file.read_bytes() for file in files] == before
    assert files[0].stat().st_mtime_ns == modified

    tall = run("sample.py", "prompts=[cat,dog]", *call, "size=[48,32]")
    assert tall.returncode == 0, tall.stderr
    assert Image.open(tmp_path / "outputs/sample/1/00003.png").size == (32, 48)
    message = complaint(run("sample.py", "prompts=[cat,dog]", *call, "seed=1", "output=outputs/sample/0"))
    assert "outputs/sample/0 has pictures of other settings, such as 00000.png (seed is 0 there, 1 here)" in message
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("wild", [False, True], ids=["steps", "weights"])
def test_wrong_sampling_option_is_refused(wild, run, runs, tiny_pipeline, tmp_path):
    if wild:
        unet = load_network(str(tiny_pipeline))
        unet.conv_out.weight.data *= 1e38  # the weights are finite, but the UNet's output is not
        save_teacher(tmp_path / "wild", unet, tiny_pipeline)
    override = "pipeline=wild" if wild else "steps=51"
    message = "the drawn latents are not finite: the UNet's weights are damaged" if wild else "use 1 to 50"
    assert message in complaint(run("sample.py", "prompts=cat", "device=cpu", override))
    assert not list(tmp_path.rglob("outputs/sample/*/*.png"))


def test_picture_mask_adapters_and_table(run, runs, tiny_pipeline, tmp_path):
    """An empty adapter does not change the image. A strong adapter and a mask change it."""
    teacher = with_adapters(load_family(tiny_pipeline), load_network(tiny_pipeline), rank=2)
    for name, scale in (("none", 0.0), ("strong", 1.0)):
        torch.manual_seed(0)
        for key, value in teacher.named_parameters():
            value.data.copy_(scale * torch.randn_like(value) if ".lora_B" in key else value.data)
        save_file({key: value.contiguous() for key, value in kohya_weights(teacher).items()}, tmp_path / f"{name}.safetensors")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    (tmp_path / "t.csv").write_text("prompt,seed,w,steps\ncat,7,2,\ndog,,,1\n")
    call = [f"pipeline={tiny_pipeline}", "prompts=t.csv", "images_per_prompt=1", "steps=2", "device=cpu", "image=photo.png"]
    pictures = {}
    for name, more in (
        ("plain", []),
        ("none", ["lora=none.safetensors"]),
        ("strong", ["lora=[strong.safetensors:0.5]"]),
        ("masked", ["mask=mask.png", "strength=0.9"]),
    ):
        drawn = run("sample.py", *call, *more, f"output={name}")
        assert drawn.returncode == 0, drawn.stderr
        pictures[name] = [np.asarray(Image.open(tmp_path / name / f"0000{i}.png"), dtype=int) for i in (0, 1)]
    info = Image.open(tmp_path / "masked/00000.png").text
    assert (info["caption"], info["seed"], info["w"], info["steps"], info["strength"]) == ("cat", "7", "2.0", "2", "0.9")
    assert "cat\nNegative prompt: \nSteps: 2, Sampler: DDIM, CFG scale: 3, Seed: 7, Size: 32x32" in info["parameters"]
    assert Image.open(tmp_path / "masked/00001.png").text["steps"] == "1"
    assert np.array_equal(pictures["plain"], pictures["none"])
    assert abs(pictures["plain"][0] - pictures["strong"][0]).mean() > 1
    assert abs(pictures["plain"][0] - pictures["masked"][0])[:, :8].mean() > 1
