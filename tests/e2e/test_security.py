"""The real programs write no secret anywhere, and hostile files have no effect."""

import re
import shutil
import tarfile

import pytest

from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from tests.e2e import warm
from tests.e2e.conftest import command, environment
from tests.security.test_hostile_files import Trap, hostile_tar

pytestmark = pytest.mark.slow

ENVIRONMENT = {
    "WANDB_API_KEY": "planted-0123456789abcdef0123456789abcdef-wandb",
    "HF_TOKEN": "planted-hf",
    "AWS_SECRET_ACCESS_KEY": "planted-aws",
}
OVERRIDES = [
    "callbacks.samples.prompts=['https://user:planted-password@host/a.tar?token=planted-query', "
    "'${oc.env:AWS_SECRET_ACCESS_KEY}', 'pipe:curl -H planted-header https://host/a.tar', 'password: open']",
]


def planted(done, folder) -> dict[str, list[bytes]]:
    """Return the planted secrets that were written, by file or output stream."""
    places = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    places |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    return {name: words for name, content in places.items() if (words := re.findall(rb"planted[\w-]*", content))}


@pytest.fixture(scope="module")
def left(tiny, tmp_path_factory):
    """Train with secrets in the options and the environment. Return the working directory and the finished process."""
    folder = tmp_path_factory.mktemp("secrets")
    options = [
        "logger=[csv,tensorboard,wandb]",
        "logger.wandb.offline=true",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
    ]
    [shards] = [override for override in tiny if override.startswith("data.shards=")]
    dead = "https://user:planted-user@127.0.0.1:9/a.tar?token=planted-query"
    cache = ["+data.cache={_target_:lcm.data.cache.ShardCache,folder:cache,attempts:2,pause:0.01}"]
    options += [f"data.shards=['{shards.partition('=')[2]}','{dead}']", *cache]
    args = command("train.py", *tiny, *options, *OVERRIDES)
    return folder, warm.run(args, folder, environment(**ENVIRONMENT), timeout=900)


def test_no_secret_is_in_what_a_run_leaves(left):
    folder, done = left
    assert done.returncode == 0, done.stderr
    assert "leaving out shard https://127.0.0.1:9/a.tar" in done.stdout
    run_dir = folder / "runs/lcd_mini/0"
    for file in ("config.yaml", "checkpoints/last.ckpt", "wandb/*/*.wandb", "tensorboard/*tfevents*", "model/lcm.json"):
        assert list(run_dir.glob(file)), file
    assert planted(done, folder) == {}
    config = (run_dir / "config.yaml").read_text()
    assert config.count("${oc.env:AWS_SECRET_ACCESS_KEY}") == 1
    assert "password: open" in config


def test_no_secret_is_in_a_complaint(run, tiny, tmp_path):
    done = run("train.py", *tiny, "ckpt_path=https://planted@host/a", **ENVIRONMENT)
    assert "ckpt_path must be a local file" in done.stderr
    assert planted(done, tmp_path) == {}


def test_a_checkpoint_that_would_run_code_is_refused(run, tiny, tmp_path):
    trap = Trap(tmp_path / "ran")
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 0, "trap": trap}, tmp_path / "evil.ckpt")
    done = run("train.py", *tiny, "ckpt_path=evil.ckpt")
    assert done.returncode == 1, done.stderr
    assert "error: a file to be loaded holds code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_run_s_config_that_names_a_command_is_refused_by_export(run, left, tmp_path):
    shutil.copytree(left[0] / "runs", tmp_path / "runs")
    config = tmp_path / "runs/lcd_mini/0/config.yaml"
    trap = "{_target_: lcm.data.fetch.subprocess.run, args: [touch, ran]}"
    config.write_text(re.sub(r"^  solver:\n(    .*\n)*", f"  solver: {trap}\n", config.read_text(), flags=re.MULTILINE))
    done = run("lcm.export", "run=runs/lcd_mini/0", **ENVIRONMENT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: solver._target_=lcm.data.fetch.subprocess.run is not allowed"), done.stderr
    assert not (tmp_path / "ran").exists()


def test_hostile_members_are_read_and_passed_on_by_no_bad_name(run, tiny_pipeline, tmp_path):
    folder = tmp_path / "in/a/folder"
    folder.mkdir(parents=True)
    data = [f"data.shards={hostile_tar(folder / 'a.tar')}", "data.resolution=32", "data.num_workers=1"]
    done = run("lcm.preview", *data, "samples=3", "shown=4", "data.batch_size=1")
    assert done.returncode == 0, done.stderr
    assert "left out: name" in done.stdout
    done = run(
        "lcm.encode", *data, "data.build=null", "data.val_shards=null", f"data.codec.pipeline={tiny_pipeline}", "out=latents"
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "latents/a.tar") as tar:
        names = tar.getnames()
    assert len(names) == 6
    assert not [name for name in names if name.startswith("/") or ".." in name]
    written = {str(path.relative_to(tmp_path)).partition("/")[0] for path in tmp_path.rglob("*")}
    assert written <= {"in", "data", "latents", "outputs"}
    assert [path.name for path in (tmp_path / "in").rglob("*") if path.is_file()] == ["a.tar"]
