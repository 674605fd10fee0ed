"""The sampling program, run as a user runs it: where it writes, what it says, what it draws again and what it refuses."""

import json
import os
import shutil

import pytest
from PIL import Image

from lcm.app.pipelines import find_pipeline
from lcm.core.errors import UserError
from lcm.models.pipeline import load_network
from tests.e2e.test_errors import complaint
from tests.models.conftest import save_student, save_teacher


@pytest.fixture
def runs(tiny_pipeline, tmp_path):
    """A student's run, then a teacher's, which is newer."""
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


def test_each_call_has_its_folder_and_draws_nothing_twice(run, runs, tmp_path):
    call = ["images_per_prompt=2", "steps=2", "device=cpu"]
    first = run("sample.py", "prompts=[cat,dog]", *call)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("model:   runs/student/0/model\n")
    assert "images:  outputs/sample/0/00000.png to 00003.png\ngrid:    outputs/sample/0/grid.png" in first.stdout
    files = sorted((tmp_path / "outputs/sample/0").iterdir())
    before = [file.read_bytes() for file in files]
    kept = files[0].stat().st_mtime_ns
    files[2].unlink()  # as if the first call had been killed before it

    again = run("sample.py", "prompts=[cat,dog]", *call)
    assert "00003.png (3 were there)" in again.stdout
    assert [file.read_bytes() for file in files] == before
    assert files[0].stat().st_mtime_ns == kept

    tall = run("sample.py", "prompts=[cat,dog]", *call, "size=[48,32]")
    assert tall.returncode == 0, tall.stderr
    assert Image.open(tmp_path / "outputs/sample/1/00003.png").size == (32, 48)
    says = complaint(run("sample.py", "prompts=[cat,dog]", *call, "seed=1", "output=outputs/sample/0"))
    assert "outputs/sample/0 has pictures of other settings, such as 00000.png (seed is 0 there, 1 here)" in says
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("wild", [False, True], ids=["steps", "weights"])
def test_what_cannot_be_drawn_is_refused(wild, run, runs, tiny_pipeline, tmp_path):
    if wild:
        unet = load_network(str(tiny_pipeline))
        unet.conv_out.weight.data *= 1e38  # finite, but not what it makes of its input
        save_teacher(tmp_path / "wild", unet, tiny_pipeline)
    override = "pipeline=wild" if wild else "steps=51"
    says = "the drawn latents are not finite: the UNet's weights are damaged" if wild else "use 1 to 50"
    assert says in complaint(run("sample.py", "prompts=cat", "device=cpu", override))
    assert not list(tmp_path.rglob("outputs/sample/*/*.png"))
