"""`python -m lcm.index`: its output and its exit code."""

import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytestmark = pytest.mark.slow


def test_cut_shard_is_named_and_ends_in_an_error(run, shards, tmp_path):
    mine = shutil.copytree(shards, tmp_path / "mine")
    scanned = run("lcm.index", "data.shards=mine/*.tar", "jobs=2")
    assert scanned.returncode == 0, scanned.stderr
    assert "usable samples)" in scanned.stdout
    assert run("lcm.index", "data.shards=mine/*.tar", "checksums=true").returncode == 0
    os.truncate(mine / "train-00001.tar", 20480)
    done = run("lcm.index", "data.shards=mine/*.tar", "verify=true")
    assert done.returncode == 1
    assert done.stdout.startswith("mine/train-00001.tar: 20480 bytes instead of ")
    assert "error: 1 shards are not whole" in done.stderr


def test_remote_shards_pass_through_memory(run, shards, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=shards)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names = [file.name for file in sorted(shards.glob("train-*.tar"))]
        urls = ",".join(f"http://127.0.0.1:{server.server_port}/{name}" for name in names)
        options = ["jobs=2", "data.index=index"]
        streamed = run("lcm.index", f"data.shards=[{urls}]", "data.cache=null", *options, LCM_DATA=str(tmp_path / "data"))
        server.shutdown()
    local = run("lcm.index", f"data.shards={shards}/train-*.tar", *options)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.partition("(")[2] == local.stdout.partition("(")[2] != ""
    assert not list(tmp_path.rglob("*.tar"))
