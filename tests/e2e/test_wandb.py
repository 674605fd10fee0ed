"""train.py logs a run to Weights & Biases. The tests read the file that wandb writes without a network."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from lcm.callbacks.wandb_logger import WandbLogger
from lcm.core.errors import UserError
from tests.e2e import warm
from tests.e2e.conftest import command, environment

BLOCK, HEADER = 32768, 7  # bytes


def records(run_dir: Path) -> Iterator[Record]:
    """Yield the records of wandb's file, a LevelDB log.

    A record is one chunk (type 1), or a first (2), middle (3) and last (4) chunk.
    """
    [file] = run_dir.glob("wandb/offline-run-*/*.wandb")
    content, at, chunks = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(content):
        if (rest := BLOCK - at % BLOCK) < HEADER:
            at += rest
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        chunks += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):
            yield Record.FromString(chunks)
            chunks = b""


def logged(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    evaluation = ["callbacks=evaluation", "callbacks.evaluation.samples=4", "callbacks.evaluation.steps=[1,2]"]
    evaluation += ["metrics@callbacks.evaluation.metrics=[clip_score]", "callbacks.evaluation.every_n_steps=2"]
    evaluation += ["callbacks.evaluation.keep_best=val/clip_score_2_steps"]
    grids = ["callbacks.samples.every_n_steps=2", "callbacks.samples.prompts=[red heart, blue chair]"]
    fast = ["+callbacks.throughput.peak_tflops=1", "+logger.wandb.settings.x_stats_sampling_interval=0.1"]
    options = [
        *tiny,
        "trainer.max_steps=4",
        "model.skip_non_finite=1",
        "logger=[csv,wandb]",
        "+logger.wandb.group=trial",
        *evaluation,
        *grids,
        *fast,
    ]
    done = warm.run(command("train.py", *options), folder, environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    return folder / "runs/lcd_mini/0"


@pytest.fixture(scope="module")
def content(run_dir: Path) -> list[Record]:
    return list(records(run_dir))


@pytest.fixture(scope="module")
def history(content: list[Record]) -> list[dict[str, Any]]:
    return [logged(record.history.item) for record in content if record.HasField("history")]


def test_images_seen_are_the_axis(content, history):
    axes = [record.metric.step_metric for record in content if record.HasField("metric") and record.metric.glob_name == "*"]
    assert axes[-1] == "trainer/images_seen"
    assert all("trainer/images_seen" in row for row in history)
    seen = {row["trainer/images_seen"] for row in history if "val/clip_score_1_steps" in row}
    assert seen == {2 * 4, 4 * 4}  # steps times the batch size


def test_rates_losses_skips_config_and_system_are_there(run_dir, content, history):
    names = {name for row in history for name in row}
    assert {"train/loss", "train/grad_norm", "train/skipped_steps", "perf/images_per_sec", "perf/data_wait"} <= names
    config = {name: value for record in content for name, value in logged(record.config.update).items()}
    assert (config["name"], config["trainer"]["max_steps"]) == ("lcd_mini", 4)
    assert any(record.HasField("stats") for record in content)
    [run] = [record.run for record in content if record.HasField("run")]
    assert (run.run_group, run.project, run.run_id) == (
        "trial",
        "latent-consistency",
        json.loads((run_dir / "run.json").read_text())["id"],
    )


def test_table_of_prompts_grows(run_dir, history):
    tables = [row for row in history if "val/prompts/path" in row]
    assert [table["val/prompts/nrows"] for table in tables] == [2, 4, 6]
    [files] = run_dir.glob("wandb/offline-run-*/files")
    last = json.loads((files / tables[-1]["val/prompts/path"]).read_text())
    assert last["columns"] == ["training step", "images seen", "prompt", "1 step", "2 steps"]
    assert [row[:3] for row in last["data"]] == [[4, 16, "red heart"], [4, 16, "blue chair"]]
    [grid] = [row["val/samples/filenames"] for row in history if "val/samples/filenames" in row][-1]
    np.testing.assert_array_equal(Image.open(files / grid), Image.open(run_dir / "samples/step-000004.png"))


def test_one_chart_has_all_step_counts(run_dir, history):
    charts = [row for row in history if "charts/clip_score_table/path" in row]
    [files] = run_dir.glob("wandb/offline-run-*/files")
    curves = json.loads((files / charts[-1]["charts/clip_score_table/path"]).read_text())["data"]
    values = {
        (row["trainer/global_step"], name): value
        for row in history
        for name, value in row.items()
        if name.startswith("val/clip")
    }
    assert {(step, name) for step, name, _ in curves if "raw" not in name} == {
        (s, n) for s in (2, 4) for n in ("1 step", "2 steps")
    }
    assert {value for step, name, value in curves if name == "2 steps"} == {values[s, "val/clip_score_2_steps"] for s in (2, 4)}


def test_model_is_an_artifact(run_dir, content, history):
    models = [record.artifact for record in content if record.artifact.type == "model"]
    scores = {row["trainer/global_step"]: row["val/clip_score_2_steps"] for row in history if "val/clip_score_2_steps" in row}
    improved = [step for step in scores if scores[step] == max(value for at, value in scores.items() if at <= step)]
    assert ["best" in model.aliases for model in models] == [True] * len(improved) + [False]
    assert "last" in models[-1].aliases
    paths = {entry.path for entry in models[-1].manifest.contents}
    assert paths == {str(path.relative_to(run_dir / "model")) for path in (run_dir / "model").rglob("*") if path.is_file()}
    assert not (run_dir / "checkpoints/best_model").exists()


class Experiment:
    """A stand-in for a wandb run. It keeps the alerts."""

    def __init__(self) -> None:
        self.alerts: list[tuple[str, str]] = []

    def log(self, values: Any) -> None: ...

    def alert(self, title: str, text: str, *, level: str, wait_duration: float) -> None:
        self.alerts.append((title, text))


def test_alerts_tell_what_went_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    experiment = Experiment()
    logger = WandbLogger(save_dir=tmp_path, experiment=experiment)
    logger.log_metrics({"train/loss": 1.0, "train/skipped_steps": 0.0, "perf/data_wait": 0.4}, 1)
    assert experiment.alerts == []
    logger.log_metrics({"train/loss": float("nan"), "perf/data_wait": 0.4}, 2)
    logger.log_metrics({"train/loss": 1.0, "train/skipped_steps": 1.0}, 3)
    logger.log_metrics({"train/loss": 1.0, "train/skipped_steps": 1.0}, 4)
    logger.log_metrics({"perf/data_wait": 0.75}, 5)
    try:
        raise UserError("no data came for 3 seconds from planted-secret")
    except UserError:
        logger.finalize("failed")
    titles = ["Non-finite loss", "Non-finite loss", "Stalled data", "Training failed"]
    assert [title for title, _ in experiment.alerts] == titles
    assert [text[:40] for _, text in experiment.alerts[:3]] == [
        *(
            "step 2: train/loss is not finite, 0 step",
            "step 3: a gradient is not finite, 1 step",
            "step 5: the training waits for data 75% ",
        ),
    ]
    assert "no data came" in experiment.alerts[3][1]
    assert "planted" not in experiment.alerts[3][1]
