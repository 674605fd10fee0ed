"""The preview prints counts, filters and buckets, and writes a grid."""

import pytest
from PIL import Image

pytestmark = pytest.mark.slow


def test_preview_prints_counts_and_writes_a_grid(run, shards, tmp_path):
    done = run("lcm.preview", f"data.shards={shards}/train-*.tar", "data.resolution=32", "data.num_workers=1",
               "data.filters.max_caption=40", "data.buckets=2", "samples=40", "shown=8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out: caption_long" in done.stdout
    assert "filter:   max_unsafe leaves out nothing" in done.stdout
    assert "bucket:   32 x 32 with" in done.stdout
    assert "samples/s with 1 workers" in done.stdout
    with Image.open(tmp_path / "outputs/preview/grid.png") as grid:
        assert grid.height > 2 * 128
