"""`python -m lcm.bench` writes its results to files."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_parts_are_written_as_table_and_json(run, tiny_pipeline, shards, tmp_path):
    tiny = ["dataset=null", f"shards={shards}/train-*.tar", "resolution=32", f"pipeline={tiny_pipeline}"]
    photos = [f"part.data.{option}" for option in ("photo_size=64", "photo_resolution=32", "photos=4", "batch_size=4")]
    quick = [
        *photos,
        "part.data.seconds=0.01",
        "part.data.repeats=1",
        "part.sampling.batch_sizes=[2]",
        "part.sampling.repeats=1",
    ]
    done = run("lcm.bench", "parts=[data,sampling]", *tiny, *quick, "output=tables")
    assert done.returncode == 0, done.stderr
    for part in ("data", "sampling"):
        record = json.loads((tmp_path / f"tables/{part}.json").read_text())
        assert f"parts=[{part}]" in record["command"]
        assert (tmp_path / f"tables/{part}.md").read_text() in done.stdout
        assert record["rows"]
        assert record["machine"]["cores"]
