"""The measurements as a program: what it writes, what it refuses."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_each_part_is_written_as_a_table_and_as_json(run, tiny_pipeline, shards, tmp_path):
    tiny = ["dataset=null", f"shards={shards}/train-*.tar", "resolution=32", f"pipeline={tiny_pipeline}"]
    quick = ["part.soak.samples=64", "part.soak.photos=4", "part.soak.photo_size=64", "part.sampling.batch_sizes=[2]"]
    done = run("lcm.bench", "parts=[soak,sampling]", *tiny, *quick, "part.sampling.repeats=1", "output=found")
    assert done.returncode == 0, done.stderr
    for part in ("soak", "sampling"):
        found = json.loads((tmp_path / f"found/{part}.json").read_text())
        assert f"parts=[{part}]" in found["command"]
        assert (tmp_path / f"found/{part}.md").read_text() in done.stdout
        assert found["rows"]
        assert found["machine"]["cores"]


def test_a_part_that_is_not_there_is_named(run):
    done = run("lcm.bench", "parts=[data,speed]", "dataset=null")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "error: parts=speed is not measured: choose among memory, data, soak, step, components, sampling, scaling"
    )
