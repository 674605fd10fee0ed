"""`python -m lcm.index`: its output and its exit code."""

import os
import shutil

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
