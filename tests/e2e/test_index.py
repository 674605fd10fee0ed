"""The manifest's program: what it prints, and its exit code."""

import os
import shutil

import pytest

pytestmark = pytest.mark.slow


def test_a_cut_shard_is_named_and_ends_in_an_error(run, shards, tmp_path):
    mine = shutil.copytree(shards, tmp_path / "mine")
    assert run("lcm.manifest", "data=shards", "data.shards=mine/*.tar").returncode == 0
    os.truncate(mine / "train-00001.tar", 20480)
    done = run("lcm.manifest", "data=shards", "data.shards=mine/*.tar", "verify=true")
    assert done.returncode == 1
    assert done.stdout.startswith("mine/train-00001.tar: 20480 bytes instead of ")
    assert "error: 1 shards are not whole" in done.stderr
