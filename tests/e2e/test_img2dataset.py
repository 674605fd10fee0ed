"""Shards of the real img2dataset train unchanged.

img2dataset needs webdataset < 0.3, and this program needs >= 1.0.2. Install img2dataset in its own environment:
`python3 -m venv i2d && i2d/bin/pip install img2dataset`, then
`LCM_IMG2DATASET=$PWD/i2d/bin/img2dataset pytest tests/e2e/test_img2dataset.py`.
"""

import csv
import json
import os
import random
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from lcm.data.filters import Filters
from lcm.data.source import Source

IMG2DATASET = os.environ.get("LCM_IMG2DATASET") or shutil.which("img2dataset")
COUNT, BROKEN, ABSENT, UNSAFE, TAGGED = 40, 7, 11, 5, (10, 20)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(IMG2DATASET is None, reason="img2dataset is not on PATH, nor named by LCM_IMG2DATASET"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of shards of 64 px images, 16 links per shard. img2dataset loads the images from a loopback server."""
    root = tmp_path_factory.mktemp("img2dataset")
    (root / "www").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root / "www"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    draw_pictures(root / "www")
    with (root / "list.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["URL", "TEXT", "NSFW", "punsafe", "pwatermark", "similarity"])
        for i in range(COUNT):
            tag, score = ("NSFW", "") if i in TAGGED else ("UNLIKELY", 0.9 if i == UNSAFE else 0.0)
            table.writerow([f"http://127.0.0.1:{server.server_port}/{i}", f"noise, number {i}", tag, score, 0.0, 0.3])
    command = [
        IMG2DATASET, "--url_list", "list.csv", "--input_format", "csv", "--url_col", "URL", "--caption_col", "TEXT",
        "--output_format", "webdataset", "--output_folder", "shards", "--image_size", "64", "--resize_mode", "center_crop",
        "--save_additional_columns", '["NSFW","punsafe","pwatermark","similarity"]',
        "--number_sample_per_shard", "16", "--processes_count", "1", "--thread_count", "4",
    ]  # fmt: skip
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return root / "shards"


def draw_pictures(www: Path) -> None:
    rng = random.Random(0)
    for i in range(COUNT):
        size = rng.randint(70, 200), rng.randint(70, 200)
        Image.effect_noise(size, 60).convert("RGB").save(www / f"{i}", ("JPEG", "PNG", "WEBP")[i % 3])
    (www / f"{BROKEN}").write_bytes((www / f"{BROKEN}").read_bytes()[:300])
    (www / f"{ABSENT}").unlink()


def test_it_is_read_and_filtered(folder):
    source = Source([str(shard) for shard in sorted(folder.glob("*.tar"))], filters=Filters())
    notes = [source.notes(shard) for shard in range(len(source.urls))]
    assert source.left_out() == {"unsafe": 1 + len(TAGGED)}
    assert sum(shard.samples for shard in notes) == COUNT - 2 - 1 - len(TAGGED)
    assert sum(json.loads(file.read_text())["successes"] for file in folder.glob("*_stats.json")) == COUNT - 2


def test_it_trains(run, folder, tmp_path):
    done = run("train.py", "data=shards", f"data.shards={folder}/*.tar", "data.resolution=64", "data.batch_size=4",
               "data.num_workers=1", "trainer.max_steps=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "data/left_out/unsafe" in (tmp_path / "runs/lcd_mini/0/metrics.csv").read_text()
    assert "model:   runs/lcd_mini/0/model" in done.stdout
