"""The evaluation program gives reproducible values, draws no image twice, and reports errors clearly."""

import csv
import hashlib
import json
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from lcm.app.composition import compose
from lcm.core.errors import UserError
from lcm.evaluate.__main__ import evaluate
from lcm.evaluate.metrics import scores
from lcm.models import text_to_image as generate
from lcm.models.lora import kohya_weights, with_adapters
from lcm.models.pipeline import load_family, load_network
from lcm.models.saving import save_network
from tests.e2e import warm
from tests.e2e.conftest import command, environment, tiny_data
from tests.evaluate.test_clip import folder as clip_folder
from tests.evaluate.test_prompts import write_coco
from tests.models.conftest import save_student, save_teacher
from tests.modules.conftest import new_module

__all__ = ["clip_folder"]


@pytest.fixture(scope="module")
def student(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "student"
    return Path(save_student(folder, tiny_pipeline, zero_init=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("reference")


@pytest.fixture
def run(tmp_path, tiny_pipeline, student, shards, cache):
    """Evaluate in this process. Return the rows of the table."""

    def run(*overrides, output="a"):
        entries = [f"entries.DDIM.pipeline={tiny_pipeline}", "entries.DDIM.steps=[1,2]", f"entries.LCM.pipeline={student}"]
        sizes = [
            "entries.LCM.steps=[1,2]",
            "samples=8",
            "chunk=3",
            "batch_size=2",
            "resolution=32",
            "grid_rows=2",
            "dtype=float32",
        ]
        where = [f"output={tmp_path / output}", f"shards={shards}/val-*.tar", f"reference_cache={cache}"]
        cfg = compose("evaluate", [f"backbone.pipeline={tiny_pipeline}", "device=cpu", *entries, *sizes, *where, *overrides])
        evaluate(cfg)
        file = tmp_path / output / "table.json"
        return json.loads(file.read_text())["rows"] if file.is_file() else None

    return run


@pytest.fixture
def drawn(monkeypatch):
    """Return a list that collects the seeds of all drawn images."""
    seeds, latents = [], generate.TextToImage.latents

    def counted(self, prompts, batch, **kwargs):
        seeds.extend(batch)
        return latents(self, prompts, batch, **kwargs)

    monkeypatch.setattr(generate.TextToImage, "latents", counted)
    return seeds


@pytest.fixture
def drawn_sizes(monkeypatch):
    """Return a list that collects the (height, width) of every drawn batch."""
    sizes, images = [], generate.TextToImage.images

    def noted(self, *args, **kwargs):
        for batch in images(self, *args, **kwargs):
            sizes.append(tuple(batch.shape[2:]))
            yield batch

    monkeypatch.setattr(generate.TextToImage, "images", noted)
    return sizes


def larger_copy(pipeline, folder):
    """Copy a pipeline, with 64 px as its training size."""
    shutil.copytree(pipeline, folder)
    config = folder / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 16}))
    return folder


def test_repeated_run_draws_nothing(run, drawn, tmp_path, shards):
    first = run()
    assert sorted(set(drawn)) == list(range(8))
    assert len(drawn) == 8 * 4
    assert run() == first
    assert len(drawn) == 8 * 4
    assert run(output="b") == first
    assert len(drawn) == 2 * 8 * 4

    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"features", "grid.png", "plot.png", "prompts.txt", "report.html", "table.csv", "table.json", "table.md"}
    text, phrases = (tmp_path / "a/table.md").read_text(), ["w = 4", "w + 1", "CLIP of", "antialiased bicubic", "centre crop"]
    for part in (*phrases, "UNet in float32", "Commit", f"{shards}/val-*"):
        assert part in text, part
    rows = list(csv.DictReader((tmp_path / "a/table.csv").open()))
    assert [{name: row[name] if name == "name" else float(row[name]) for name in row} for row in rows] == first


def test_remote_shards_are_cached(run, shards, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=shards))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = ",".join(f"http://127.0.0.1:{server.server_port}/{file.name}" for file in sorted(shards.glob("val-*.tar")))
    try:
        assert run(f"shards=[{where}]", f"cache.folder={tmp_path}/cache", output="b") == run()
    finally:
        server.shutdown()
        server.server_close()


def test_new_metrics_and_samples_reuse_features(run, drawn):
    run("metrics=[clip_score]")
    drawn.clear()
    assert set(run("metrics=[fid,kid]")[0]) == {"name", "steps", "w", "fid", "kid"}
    assert not drawn
    run("samples=9")
    assert sorted(drawn) == sorted([6, 7, 8] * 4)  # the last chunk was incomplete


def test_processes_share_chunks(run, drawn):
    alone = run(output="alone")
    drawn.clear()
    assert run("rank=1", "world_size=2") is None
    share = len(drawn)
    assert 0 < share < 8 * 4
    assert run("rank=0", "world_size=2") == alone
    assert len(drawn) == 8 * 4
    assert run("rank=40", "world_size=50", output="many") is None  # there are fewer chunks than ranks: rank 40 has none
    with pytest.raises(UserError, match="run the same command again"):
        run("rank=0", "world_size=50", "patience=0.5", output="many")  # no other rank runs
    assert run(output="many") == alone


def test_changed_inputs_are_drawn_again(run, drawn, tmp_path, student, monkeypatch):
    run()
    for change in ("w=1.0", "seed=1", "+entries.LCM.sampler=ddim"):
        drawn.clear()
        run(change)
        assert drawn, change
    unet, other = load_network(str(student)), shutil.copytree(student, tmp_path / "other")
    unet.conv_out.bias.data[0] += 1e-3
    save_network(other / "unet", unet, torch.float32)
    drawn.clear()
    run(f"entries.LCM.pipeline={other}")
    assert len(drawn) == 8 * 2
    drawn.clear()
    monkeypatch.setattr("lcm.evaluate.jobs.CACHE_VERSION", 2)
    run()
    assert len(drawn) == 8 * 4


def test_images_are_drawn_at_the_resolution(run, drawn_sizes, tiny_pipeline, tmp_path, caplog):
    larger = larger_copy(tiny_pipeline, tmp_path / "larger")
    both = [f"entries.{name}.pipeline={larger}" for name in ("DDIM", "LCM")]
    run("resolution=null", output="own")
    assert set(drawn_sizes) == {(32, 32)}
    drawn_sizes.clear()
    run("resolution=null", *both, output="larger")
    assert set(drawn_sizes) == {(64, 64)}
    assert "resize to 64 px" in (tmp_path / "larger/table.md").read_text()
    drawn_sizes.clear()
    assert "draws" not in caplog.text
    with caplog.at_level("WARNING"):
        run("resolution=32", *both, output="smaller")
    assert set(drawn_sizes) == {(32, 32)}
    assert "entries.LCM draws 32 px images with a model of 64 px images: entries.LCM.size=64" in caplog.text


def test_entry_size(run, drawn_sizes, tmp_path):
    rows = run("+entries.LCM.size=64")
    assert set(drawn_sizes) == {(32, 32), (64, 64)}
    assert "LCM is drawn at 64 px and resized to 32 px" in (tmp_path / "a/table.md").read_text()
    drawn_sizes.clear()
    assert run(output="b")[2] != rows[2]


def test_adapters_of_an_entry_change_its_row_only(run, tiny_pipeline, tmp_path):
    adapted = with_adapters(load_family(tiny_pipeline), load_network(tiny_pipeline), rank=2)
    for name, value in adapted.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(value)
    save_file({name: value.contiguous() for name, value in kohya_weights(adapted).items()}, tmp_path / "style.safetensors")
    before = run()
    entry = f"{{pipeline: {tiny_pipeline}, steps: [1, 2], sampler: ddim, lora: '{tmp_path}/style.safetensors:0.5'}}"
    rows = run(f"+entries.Style={entry}")
    assert rows[:4] == before
    assert [row["name"] for row in rows[4:]] == ["Style", "Style"]
    assert all(style["fid"] != plain["fid"] for style, plain in zip(rows[4:], rows, strict=False))


def test_invalid_sizes_are_errors(run, drawn, tiny_pipeline, tmp_path):
    larger = f"entries.LCM.pipeline={larger_copy(tiny_pipeline, tmp_path / 'larger')}"
    with pytest.raises(UserError, match="the entries draw 32 x 32 and 64 x 64 px images: set resolution=<pixels>"):
        run("resolution=null", larger)
    with pytest.raises(UserError, match=r"entries\.LCM\.size=\[64, 32\]: metrics compare squares: give one number"):
        run("+entries.LCM.size=[64,32]")
    with pytest.raises(UserError, match=r"entries\.LCM\.size=63: 63 is not a multiple of the VAE's factor 4"):
        run("+entries.LCM.size=63")
    with pytest.raises(UserError, match="resolution=30: 30 is not a multiple of the VAE's factor 4: use 28 or 32"):
        run("resolution=30")
    assert not drawn


def test_non_finite_images_are_an_error(run, tiny_pipeline, tmp_path):
    unet = load_network(str(tiny_pipeline))
    unet.conv_out.weight.data *= 1e38  # the weights are finite, but the UNet's output is not
    save_teacher(tmp_path / "wild", unet, tiny_pipeline)
    with pytest.raises(UserError, match="LCM at 1 steps and w = 4: the drawn latents are not finite"):
        run(f"entries.LCM.pipeline={tmp_path}/wild", output="a")
    assert not (tmp_path / "a/table.md").exists()
    assert len(list((tmp_path / "a/features").rglob("*.safetensors"))) == 2 * 3  # the chunks of DDIM


def test_non_finite_features_are_an_error(run, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("lcm.evaluate.clip.ClipBackbone.forward", lambda self, x: torch.full((len(x), 8), float("inf")))
    with pytest.raises(UserError, match="the clip features are not finite: the backbone's weights are damaged"):
        run(f"reference_cache={tmp_path}/reference")
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(UserError, match="the text features are not finite"):
        scores({"clip": torch.ones(3, 2), "text": torch.full((3, 2), float("nan"))}, {"real": {"clip": torch.ones(3, 2)}}, {})


SPREAD = """
import torch
from lcm.evaluate.metrics import FeatureSets

class Spread(FeatureSets):
    def __init__(self, power: float, **kwargs):
        super().__init__(**kwargs)
        self.power = power

    def compute(self):
        real, drawn = self.sets()
        return drawn.var() / real.var() ** self.power
"""
SPREAD_YAML = """
spread:
  _target_: lcm.evaluate.metrics.FeatureMetric
  title: Spread in %
  scale: 100
  lower_is_better: false
  features: clip
  metric: {_target_: spread.Spread, _partial_: true, power: 1.0}
"""


@pytest.mark.slow
def test_own_metric_needs_no_edit(tiny_pipeline, shards, tmp_path):
    """The metric's YAML file is in a folder of hydra.searchpath. docs/extending.md uses --config-dir instead."""
    (tmp_path / "own/metrics").mkdir(parents=True)
    (tmp_path / "own/metrics/spread.yaml").write_text(SPREAD_YAML)
    (tmp_path / "spread.py").write_text(SPREAD)
    args = [
        f"hydra.searchpath=['file://{tmp_path}/own']", "metrics=[spread,precision,fid]", "metrics.spread.metric.power=0.5",
        "samples=6", "grid_rows=2", "~entries.LCM", f"entries.DDIM.pipeline={tiny_pipeline}", "entries.DDIM.steps=[1,2]",
        f"shards={shards}/val-*.tar", f"backbone.pipeline={tiny_pipeline}", "resolution=32", "device=cpu",
    ]  # fmt: skip
    done = warm.run(command("lcm.evaluate", *args), tmp_path, environment(PYTHONPATH=str(tmp_path)), timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs/evaluate"
    assert "| | Spread in %, 1 step | Spread in %, 2 steps | Precision, 1 | Precision, 2 |" in (folder / "table.md").read_text()
    [row, _] = json.loads((folder / "table.json").read_text())["rows"]
    assert list(row) == ["name", "steps", "w", "spread", "precision", "fid"]
    assert row["spread"] > 0


def test_w_lists_give_rows_and_a_plot(run, tmp_path):
    rows = run("w=[0,3]", "+entries.LCM.w=2", "metrics=[fid,clip_score]")
    assert [(row["name"], row["steps"], row["w"]) for row in rows] == [
        *(("DDIM", steps, w) for w in (0, 3) for steps in (1, 2)), ("LCM", 1, 2), ("LCM", 2, 2),
    ]  # fmt: skip
    table = (tmp_path / "a/table.md").read_text()
    assert all(f"| {name} |" in table for name in ("DDIM, w = 0", "DDIM, w = 3", "LCM, w = 2"))
    assert Image.open(tmp_path / "a/w.png").width > 500


def test_grid_does_not_depend_on_chunks(run, tmp_path):
    run("chunk=3", "grid_rows=7", output="a")
    run("chunk=8", "grid_rows=7", output="b")
    grids = [Image.open(tmp_path / name / "grid.png") for name in "ab"]
    assert grids[0].height > 7 * 128
    assert grids[0].size == grids[1].size


def test_captions_repeat_with_new_seeds(run, drawn, tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\nrocket\ndog face\n")
    run(f"prompts={tmp_path}/prompts.txt", "~entries.LCM")
    assert sorted(drawn) == sorted([*range(8)] * 2)
    assert "8 images per cell of 3 captions" in (tmp_path / "a/table.md").read_text()


def test_teacher_is_drawn_once_with_seeds_of_its_own(run, drawn, tiny_pipeline, tmp_path):
    teacher = ["metrics=[fid,fid_teacher]", f"teacher={{pipeline:{tiny_pipeline},steps:2}}"]
    rows = run(*teacher)
    assert sorted(drawn) == sorted([*range(8)] * 4 + [*range(8, 16)])
    assert [row["name"] for row in rows] == ["DDIM", "DDIM", "LCM", "LCM"]
    assert rows[1]["fid_teacher"] < min(rows[0]["fid_teacher"], rows[2]["fid_teacher"], rows[3]["fid_teacher"])
    assert "FID to teacher compares with 8 images of" in (tmp_path / "a/table.md").read_text()
    drawn.clear()
    assert run(*teacher) == rows
    assert not drawn


def test_teacher_metrics_need_no_real_images(run, tiny_pipeline, tmp_path):
    names = ["fid_teacher", "kid_teacher", "cmmd_teacher", "clip_score", "diversity", "seconds"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\nrocket\ndog\n")
    rows = run(
        f"metrics=[{','.join(names)}]", f"teacher={{pipeline:{tiny_pipeline},steps:2}}", "~entries.LCM", f"prompts={prompts}",
        "per_prompt=4", "shards=nowhere/*.tar", "metrics.seconds.repeats=1",
    )  # fmt: skip
    assert list(rows[0]) == ["name", "steps", "w", *names]
    assert all(row["seconds"] > 0 and 0 < row["diversity"] < 200 for row in rows)
    table = (tmp_path / "a/table.md").read_text()
    for part in (
        "8 images per cell of 2 captions",
        "No real images",
        "KID x 1000 to teacher",
        "Seconds per image: from prompt to",
    ):
        assert part in table, part
    assert (tmp_path / "a/prompts.txt").read_text() == "red apple\nrocket\n"


def test_coco_protocol(tiny_pipeline, clip_folder, tmp_path, drawn_sizes, caplog):
    """Small files have the real formats: captions_val2017.json, a folder of JPEGs, and pytorch-fid's statistics."""
    coco, pictures = write_coco(tmp_path / "captions_val2017.json"), tmp_path / "val2017"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(pictures / f"{i:012d}.jpg")

    def run(*overrides):
        args = [
            "protocol=coco5k", f"prompts={coco}", f"reference={pictures}", "samples=10", "resolution=16", "grid_rows=2",
            f"backbone.model={clip_folder}", "backbone@fid_backbone=mini", f"fid_backbone.pipeline={tiny_pipeline}",
            "device=cpu", "~entries.LCM", f"entries.DDIM.pipeline={tiny_pipeline}", "entries.DDIM.steps=[1]",
            f"output={tmp_path / 'out'}", f"reference_cache={tmp_path / 'cache'}", "dtype=float32",
        ]  # fmt: skip
        with caplog.at_level("INFO"):
            evaluate(compose("evaluate", [*args, *overrides]))
        return json.loads((tmp_path / "out/table.json").read_text())

    result = run()
    [row] = result["rows"]
    assert list(row) == ["name", "steps", "w", "fid", "clip_score", "precision", "recall"]
    assert set(drawn_sizes) == {(32, 32)}  # the model's own size, not the resolution of 16 px
    digest = hashlib.sha256((tmp_path / "out/prompts.txt").read_bytes()).hexdigest()
    assert result["prompts_sha256"] == digest
    assert f"SHA-256 of the 10 prompts: {digest}" in caplog.text
    for part in ("Protocol: coco5k", digest, f"Reference: 12 images of `{pictures}`; centre crop", "resize to 16 px"):
        assert part in result["note"], part

    [file] = (tmp_path / "cache").glob("*.safetensors")
    real = load_file(file)["fid"].double().numpy()
    np.savez_compressed(tmp_path / "coco.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    drawn_sizes.clear()
    statistics = [f"reference={tmp_path}/coco.npz", f"prompts_sha256={digest}"]
    result = run(*statistics, "metrics=[fid,clip_score]")
    assert not drawn_sizes
    assert result["rows"][0]["fid"] == pytest.approx(row["fid"], rel=1e-6)
    assert "Reference: the mean and covariance in" in result["note"]
    with pytest.raises(UserError, match=r"metrics=\['precision', 'recall'\] compare images: give a folder"):
        run(*statistics)
    for arrays, message in (
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"mu \(3,\) and sigma \(3, 3\), but the network of FID has 8 features"),
        ({"mu": np.array([{}]), "sigma": np.eye(3)}, "cannot be read .* without pickled objects"),
        ({"a": np.eye(3)}, "expected a .npz file with the arrays mu and sigma"),
    ):
        np.savez(tmp_path / "coco.npz", **arrays)
        with pytest.raises(UserError, match=message):
            run(*statistics, "metrics=[fid,clip_score]")


@pytest.mark.parametrize("missing", ["prompts", "reference"])
def test_missing_file_of_a_protocol_is_named_before_any_work(missing, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("LCM_DATA", str(tmp_path))
    coco = tmp_path / "coco/captions_val2014.json"
    (tmp_path / "coco/val2014").mkdir(parents=True)
    if missing == "reference":
        (tmp_path / "coco/val2014").rmdir()
        write_coco(coco)
    args = [
        "protocol=coco30k",
        "~entries.LCM",
        f"entries.DDIM.pipeline={tiny_pipeline}",
        f"output={tmp_path}/out",
        "device=cpu",
    ]
    message = (
        f"there is no caption file {coco}: it is in" if missing == "prompts" else f"reference={tmp_path}/coco/val2014: there is"
    )
    with pytest.raises(UserError, match=message):
        evaluate(compose("evaluate", args))


def test_vague_suite_draws_vague_captions(run, tmp_path):
    exact = run()
    vague = run("suite=vague", output="b")
    assert ", exact captions), seeds" in (tmp_path / "a/table.md").read_text()
    assert ", vague captions), seeds" in (tmp_path / "b/table.md").read_text()
    assert [row["clip_score"] for row in exact] != [row["clip_score"] for row in vague]


def test_fid_backbone_does_not_change_clip_score(run, tiny_pipeline):
    rows = run()
    other = run(
        "backbone@fid_backbone=mini", f"fid_backbone.pipeline={tiny_pipeline}", "fid_backbone.antialias=false", output="b"
    )
    assert [row["clip_score"] for row in other] == [row["clip_score"] for row in rows]


def test_tensorboard_gets_metrics_and_pictures(run, tmp_path):
    run("logger=tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a/tensorboard"))
    events.Reload()
    assert "fid/LCM" in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("fid/LCM")] == [1, 2]
    assert {"evaluate/grid", "evaluate/plot"} <= set(events.Tags()["images"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("entries.LCM.steps=[1,1]", "entries.LCM.steps has 1 twice"),
        ("+entries.LCM.sampler=dddim", "entries.LCM.sampler=dddim is none of ddim"),
        ("metrics=[fid_teacher]", "metrics=['fid_teacher'] compare with a teacher's images: set 'teacher="),
        ("teacher={pipeline:mini,steps:2}", "teacher is used by no metric: choose one that compares with it"),
        ("metrics=[fid_teacher] teacher={pipeline:mini,steps:[1,2]}", "teacher has several steps or w: give one of each"),
        ("captions={blip:1}", "has no captions that can be read (no_caption: none of blip among"),
        ("samples=1", "at least 2 samples"),
        ("reference=nowhere/*.tar", "no shards match 'nowhere/*.tar': point reference at"),
        ("reference=nowhere/val2014", "reference=nowhere/val2014: there is no such folder or file: give a folder of images"),
        ("metrics=[clip_score] reference=.", "reference=. is used by no metric: leave it out"),
        (
            "metrics=[diversity]",
            "metrics=['diversity'] compare images of one prompt, and each prompt has one: set per_prompt=4",
        ),
        ("~entries.LCM ~entries.DDIM", "nothing to evaluate"),
        ("backbone@fid_backbone=inception", "torch-fidelity|no InceptionV3 weights at"),
    ],
)
def test_wrong_input_is_refused_before_drawing(run, drawn, override, says):
    with pytest.raises(UserError, match=says.replace("*", r"\*").replace("[", r"\[").replace("(", r"\(")):
        run(*override.split(" "))
    assert not drawn


def test_unguided_model_refuses_w(run, drawn, tiny_pipeline, tmp_path):
    new_module(tiny_pipeline, "cd").save_model(str(tmp_path / "cd"), dtype=torch.float32)
    with pytest.raises(UserError, match=r"set entries\.LCM\.w=0"):
        run(f"entries.LCM.pipeline={tmp_path}/cd")
    assert not drawn
    run(f"entries.LCM.pipeline={tmp_path}/cd", "+entries.LCM.w=0")


def test_too_few_images_give_warnings(run, caplog, tmp_path):
    with caplog.at_level("WARNING"):
        run()
    assert "8 images do not fill the 8 dimensions" in caplog.text
    assert "8 images do not fill the 8 dimensions" in (tmp_path / "a/table.md").read_text()
    with caplog.at_level("WARNING"):
        run("samples=40", output="b")
    assert "fewer than the 40 drawn" in caplog.text


def test_backbone_configs_name_real_parameters():
    from tests.conf.test_config import CONF, parameters

    for file in (CONF / "backbone").glob("*.yaml"):
        node = OmegaConf.load(file)
        assert {str(key) for key in node} - {"_target_"} <= parameters(node._target_), file


def test_label_names_the_row(run):
    rows = run("+entries.LCM.label=DPM-Solver++")
    assert {row["name"] for row in rows} == {"DDIM", "DPM-Solver++"}
    compose("evaluate", ["entries=paper", "entries.DPM-Solver-pp.steps=[8]"])


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_values(run, tiny_pipeline, student, shards, cache, tmp_path):
    options = ["entries.DDIM.steps=[4,20]", "samples=16", "chunk=4", "batch_size=4"]
    args = [
        f"entries.DDIM.pipeline={tiny_pipeline}", f"entries.LCM.pipeline={student}", "entries.LCM.steps=[1,2]", "resolution=32",
        "grid_rows=2", "dtype=float32", "device=cpu", f"shards={shards}/val-*.tar", f"backbone.pipeline={tiny_pipeline}",
        f"reference_cache={cache}", *options, f"output={tmp_path}/a",
    ]  # fmt: skip
    other = warm.start(command("lcm.evaluate", *args), tmp_path, environment())
    features = tmp_path / "a/features"
    while len(list(features.rglob("*.safetensors"))) < 2:  # some chunks are drawn, more are missing
        assert other.poll() is None
        time.sleep(0.01)
    other.kill()
    assert other.wait(60) != 0
    cached = {file: file.stat().st_mtime_ns for file in features.rglob("*.safetensors")}
    assert 0 < len(cached) < 16

    resumed = run(*options)
    assert {file: file.stat().st_mtime_ns for file in cached} == cached
    assert resumed == run(*options, output="b")
    left = [file for file in tmp_path.rglob("*.partial") if str(other.pid) not in file.name]
    assert not left  # the killed process leaves its own partial files


@pytest.mark.slow
def test_training_on_three_ranks_measures_the_same(tiny_pipeline, shards, tmp_path):
    """With lr = 0 the metrics of all steps are equal. Ranks 0 and 1 keep two samples each, and rank 2 keeps none."""
    rows, metrics = [], "fid,kid,cmmd,clip_score,precision,recall"
    for trainer, devices in (("default", 1), ("fsdp", 3)):
        train = (
            command(
                "train.py", f"model.pipeline={tiny_pipeline}", *tiny_data(shards), "trainer.max_steps=2",
                "callbacks=evaluation", f"metrics@callbacks.evaluation.metrics=[{metrics}]",
                f"callbacks.evaluation.backbone.pipeline={tiny_pipeline}", "callbacks.evaluation.samples=4",
                "callbacks.evaluation.every_n_steps=1", "model.optimizer.lr=0", "data.codec.dtype=null",
                "+callbacks.evaluation.batch_size=1",  # the last bits of an image depend on its batch
                f"trainer={trainer}", "trainer.accelerator=cpu", f"trainer.devices={devices}", f"name={trainer}",
                "callbacks.samples.steps=[1]",
            ),
            tmp_path, environment(), 500,
        )  # fmt: skip
        for done in warm.ranks(devices, *train) if devices > 1 else [warm.run(*train)]:
            assert done.returncode == 0, done.stderr
        logged = csv.DictReader((tmp_path / f"runs/{trainer}/0/metrics.csv").open())
        rows.append(
            [[float(row[f"val/{name}_4_steps"]) for name in metrics.split(",")] for row in logged if row["val/fid_4_steps"]]
        )
    one_rank, three_ranks = rows
    assert len(one_rank) == 2
    assert one_rank == three_ranks
