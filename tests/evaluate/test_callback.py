"""Evaluation during training gives the values of the evaluation program. It does not change the training.

It measures the EMA network and the trained network.
"""

import lightning as L
import pytest
import torch

from lcm.app.cli import build
from lcm.app.composition import compose
from lcm.callbacks.samples import ImageGrid
from lcm.core.errors import UserError
from lcm.data.cache import ShardCache
from lcm.data.captions import read_captions
from lcm.data.filters import Filters
from lcm.data.source import Source
from lcm.data.urls import expand_urls
from lcm.evaluate.callback import Evaluation
from lcm.evaluate.clip import mini_clip
from lcm.evaluate.features import Extractor, joined
from lcm.evaluate.metrics import scores
from lcm.evaluate.reward import ScoreReward
from tests.data.conftest import png, write_shard
from tests.evaluate.test_metrics import METRICS

TWO = {name: METRICS[name] for name in ("fid", "clip_score")}


@pytest.fixture
def callback(tiny_pipeline, shards, tmp_path):
    def make(files=f"{shards}/val-*.tar", **options):
        defaults = {"metrics": TWO, "steps": [1, 2], "w": 3.0, "samples": 6, "every_n_steps": 2, "batch_size": 4}
        options = {**defaults, "resolution": 32, **options}
        backbone = mini_clip(str(tiny_pipeline))
        return Evaluation(files, backbone=backbone, reference_cache=str(tmp_path / "reference"), **options)

    return make


def test_values_match_the_program_for_both_networks(training, data, fit, callback, codec, shards, tiny_pipeline, tmp_path):
    module, evaluation = training("diffusion", eval_ema=0.9), callback()
    metrics = fit(module, data(), 3, callbacks=[evaluation]).callback_metrics
    names = {f"val/{metric}_{n}_steps{raw}" for metric in ("fid", "clip_score") for n in (1, 2) for raw in ("", "_raw")}
    assert names <= set(metrics)
    assert metrics["val/fid_2_steps"] != metrics["val/fid_2_steps_raw"]

    extract = Extractor(mini_clip(str(tiny_pipeline)), resolution=32)
    held_out = Source(expand_urls(f"{shards}/val-*.tar"))
    captions = read_captions(held_out, 6)
    images = module.text_to_image(codec).images(captions, list(range(6)), steps=2, w=3.0, batch_size=6)
    expected = scores(
        joined([extract(part, captions) for part in images]), {"real": extract.reference(held_out, tmp_path)}, TWO
    )
    for metric in ("fid", "clip_score"):
        assert float(metrics[f"val/{metric}_2_steps"]) == pytest.approx(expected[metric], rel=1e-4)


def test_trained_reward_is_left_out(training, data, fit, callback, tiny_pipeline, caplog):
    def run(**options):
        module = training("distillation", reward=ScoreReward(mini_clip(str(tiny_pipeline))))
        return fit(module, data(), 1, callbacks=[callback(steps=[1], **options)]).callback_metrics

    with caplog.at_level("WARNING"):
        metrics = run()
    assert "val/fid_1_steps" in metrics
    assert "val/clip_score_1_steps" not in metrics
    assert caplog.text.count("CLIP is left out: a training raised this score as its reward.") == 1
    with pytest.raises(UserError, match=r"keep_best=val/clip_score_1_steps is the reward of this training: choose a metric"):
        run(keep_best="val/clip_score_1_steps")


def test_shards_use_cache_and_filters_of_the_data(training, data, fit, callback, shards, tmp_path):
    """The evaluation reads remote shards through the cache of the data. It uses only samples that pass the data's filters."""
    known = read_captions(Source(expand_urls(f"{shards}/val-*.tar")))
    longest = sorted(map(len, known))[len(known) // 2]
    for limit in (None, longest):
        evaluation = callback([f"pipe:cat {file}" for file in sorted(shards.glob("val-*.tar"))], steps=[1])
        options = {"allow_pipe": True, "cache": ShardCache(str(tmp_path / "cache")), "filters": Filters(max_caption=limit)}
        fit(training("distillation"), data(**options), 1, callbacks=[evaluation])
        captions = [caption for caption in known if limit is None or len(caption) <= limit]
        assert evaluation.captions[: len(captions)] == captions[:6]
        assert len(evaluation.real["clip"]) == len(captions)


def test_images_are_drawn_at_the_resolution(training, data, fit, callback, monkeypatch):
    """The default is the resolution of the training."""
    drawn, call = [], Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda self, x, captions: drawn.append(x.shape[2:]) or call(self, x, captions))
    for resolution, expected in ((None, 64), (48, 48)):
        drawn.clear()
        evaluation = callback(steps=[1], resolution=resolution)
        fit(training("distillation"), data(resolution=64), 1, callbacks=[evaluation])
        assert set(drawn) == {(expected, expected)}
        assert evaluation.extract.resolution == expected
    with pytest.raises(UserError, match=r"callbacks\.evaluation\.resolution=30: 30 is not a multiple of the VAE's factor 4"):
        fit(training("distillation"), data(), 1, callbacks=[callback(resolution=30)])


def test_non_finite_images_give_a_warning_and_no_metric(training, data, fit, callback, tmp_path, caplog):
    """The best checkpoint ignores non-finite images. The metrics keep no value of an earlier step."""

    class Damage(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 3:
                module.ema_net.conv_out.weight.data.fill_(float("nan"))

    grids = ImageGrid(str(tmp_path / "grids"), ["rocket"], steps=[1], w=0.0, every_n_steps=2)
    best = callback(steps=[1], keep_best="val/fid_1_steps", folder=str(tmp_path))
    with caplog.at_level("WARNING"):
        metrics = fit(training("diffusion", eval_ema=0.9), data(), 4, callbacks=[grids, best, Damage()]).callback_metrics
    assert {"val/fid_1_steps_raw", "val/clip_score_1_steps_raw"} == {name for name in metrics if name.startswith("val/")}
    assert "no metrics of 1 sampling steps at step 4: the drawn latents are not finite" in caplog.text
    assert caplog.text.count("no image grid at step 4: the drawn latents are not finite") == 1
    assert list(grids.history) == [0, 2]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 2


def test_captions_use_the_weights_of_the_data(training, data, fit, callback, tmp_path):
    samples = [{"__key__": f"{i}", "png": png((32, 32)), "blip": f"blip {i}"} for i in range(4)]
    evaluation = callback(write_shard(tmp_path / "a.tar", samples), steps=[1], samples=4)
    fit(training("distillation"), data(captions={"blip": 1, "txt": 1}, filters=Filters()), 1, callbacks=[evaluation])
    assert evaluation.captions == [f"blip {i}" for i in range(4)]


def test_unwritable_reference_cache_is_an_error(callback, shards, tmp_path):
    (tmp_path / "reference").touch()
    source, evaluation = Source(expand_urls(f"{shards}/val-*.tar")), callback()
    with pytest.raises(UserError, match=r"reference \(.*\): set reference_cache to a writable folder"):
        Extractor(evaluation.backbone, resolution=32).reference(source, evaluation.reference_cache)


def test_training_is_unchanged(training, data, fit, callback, tmp_path):
    plain, measured = training("distillation", eval_ema=0.9), training("distillation", eval_ema=0.9)
    fit(plain, data(), 4)
    trainer = fit(measured, data(), 4, callbacks=[callback()])
    for (name, a), (_, b) in zip(plain.state_dict().items(), measured.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert measured.net.training
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not any("clip" in name for name in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])


def test_evaluates_every_n_steps_and_at_the_end(training, data, fit, callback, monkeypatch):
    evaluation, at = callback(steps=[1]), []
    monkeypatch.setattr(Evaluation, "features", lambda self, trainer, *_: at.append(trainer.global_step) or {})
    monkeypatch.setattr("lcm.evaluate.callback.scores", lambda *_: {"fid": 1.0})
    fit(training("distillation"), data(), 5, callbacks=[evaluation], accumulate_grad_batches=2)
    assert at == [2, 4, 5]


def test_missing_val_shards_is_an_error(tiny_pipeline):
    options = {"metrics": TWO, "steps": [1], "w": 0.0, "resolution": 32, "reference_cache": "r"}
    with pytest.raises(UserError, match=r"set data\.val_shards"):
        Evaluation(None, backbone=mini_clip(str(tiny_pipeline)), **options)


@pytest.mark.parametrize("metric", ["fid", "clip_score"])
def test_best_checkpoint_survives_restarts(training, data, fit, callback, monkeypatch, tmp_path, metric):
    sign = 1 if metric == "fid" else -1

    def run(until, *values, **options):
        results = iter(values)
        monkeypatch.setattr(Evaluation, "features", lambda *_: {})
        monkeypatch.setattr("lcm.evaluate.callback.scores", lambda *_: {metric: sign * next(results)})
        evaluation = callback(steps=[4], keep_best=f"val/{metric}_4_steps", folder=str(tmp_path))
        last = tmp_path / "last.ckpt"
        fit(training("distillation"), data(), until, callbacks=[evaluation], **options).save_checkpoint(last)
        return last, torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"]

    last, best = run(6, 3.0, 1.0, 2.0)
    assert best == 4
    assert run(8, 1.5, ckpt_path=last)[1] == 4
    assert run(10, 0.5, ckpt_path=last)[1] == 10


def test_unmeasured_keep_best_is_an_error(callback):
    with pytest.raises(
        UserError, match=r"keep_best=val/fid is not measured: choose from val/fid_1_steps, val/fid_2_steps, val/cl"
    ):
        callback(keep_best="val/fid")


def test_metrics_are_chosen_by_name():
    config = compose("train", ["callbacks=evaluation", "metrics@callbacks.evaluation.metrics=[recall,kid]"])
    metrics = build(config.callbacks.evaluation.metrics)
    assert [metric.title for metric in metrics.values()] == ["Recall", "KID x 1000"]
