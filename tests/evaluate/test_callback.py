"""Evaluation during training: the digits of the program, for the average and the trained network, and no trace of it left."""

import lightning as L
import pytest
import torch

from lcm.callbacks.samples import ImageGrid
from lcm.core.errors import UserError
from lcm.data.cache import ShardCache
from lcm.data.captions import read_captions
from lcm.data.filters import Filters
from lcm.data.source import Source
from lcm.data.urls import expand_urls
from lcm.evaluate.callback import Evaluation
from lcm.evaluate.clip import mini_clip
from lcm.evaluate.features import Extractor, joined, scores
from tests.data.conftest import png, write_shard


@pytest.fixture
def callback(tiny_pipeline, shards, tmp_path):
    def make(files=f"{shards}/val-*.tar", **options):
        options = {"steps": [1, 2], "w": 3.0, "samples": 6, "every_n_steps": 2, "batch_size": 4, "resolution": 32, **options}
        backbone = mini_clip(str(tiny_pipeline))
        return Evaluation(files, backbone=backbone, reference_cache=str(tmp_path / "reference"), **options)

    return make


def test_both_networks_are_measured_as_the_program_would(training, data, fit, callback, codec, shards, tiny_pipeline, tmp_path):
    module, one = training("diffusion", eval_ema=0.9), callback()
    metrics = fit(module, data(), 3, callbacks=[one]).callback_metrics
    names = {f"val/{metric}_{n}_steps{raw}" for metric in ("fid", "clip_score") for n in (1, 2) for raw in ("", "_raw")}
    assert names <= set(metrics)
    assert metrics["val/fid_2_steps"] != metrics["val/fid_2_steps_raw"]

    extract = Extractor(mini_clip(str(tiny_pipeline)), resolution=32)
    held_out = Source(expand_urls(f"{shards}/val-*.tar"))
    captions = read_captions(held_out, 6)
    images = module.text_to_image(codec).images(captions, list(range(6)), steps=2, w=3.0, batch_size=6)
    expected = scores(joined([extract(part, captions) for part in images]), extract.reference(held_out, tmp_path))
    for metric in ("fid", "clip_score"):
        assert float(metrics[f"val/{metric}_2_steps"]) == pytest.approx(expected[metric], rel=1e-4)


def test_shards_are_read_as_those_of_the_data(training, data, fit, callback, shards, tmp_path):
    """From elsewhere, through the data's cache; and those samples alone that its filters keep."""
    known = read_captions(Source(expand_urls(f"{shards}/val-*.tar")))
    longest = sorted(map(len, known))[len(known) // 2]
    for limit in (None, longest):
        one = callback([f"pipe:cat {file}" for file in sorted(shards.glob("val-*.tar"))], steps=[1])
        options = {"allow_pipe": True, "cache": ShardCache(str(tmp_path / "cache")), "filters": Filters(max_caption=limit)}
        fit(training("distillation"), data(**options), 1, callbacks=[one])
        kept = [caption for caption in known if limit is None or len(caption) <= limit]
        assert one.captions[: len(kept)] == kept[:6]
        assert len(one.real["clip"]) == len(kept)


def test_images_are_drawn_at_the_size_at_which_they_are_compared(training, data, fit, callback, monkeypatch):
    """By default that of the training."""
    drawn, own = [], Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda self, x, captions: drawn.append(x.shape[2:]) or own(self, x, captions))
    for resolution, expected in ((None, 64), (48, 48)):
        drawn.clear()
        one = callback(steps=[1], resolution=resolution)
        fit(training("distillation"), data(resolution=64), 1, callbacks=[one])
        assert set(drawn) == {(expected, expected)}
        assert one.extract.resolution == expected
    with pytest.raises(UserError, match=r"callbacks\.evaluation\.resolution=30: 30 is not a multiple of the VAE's factor 4"):
        fit(training("distillation"), data(), 1, callbacks=[callback(resolution=30)])


def test_images_that_are_not_finite_are_a_warning_and_no_metric(training, data, fit, callback, tmp_path, caplog):
    """Neither does the best checkpoint know of them, nor do the metrics keep an earlier value."""

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


def test_prompts_are_the_captions_that_the_data_reads(training, data, fit, callback, tmp_path):
    samples = [{"__key__": f"{i}", "png": png((32, 32)), "blip": f"blip {i}"} for i in range(4)]
    one = callback(write_shard(tmp_path / "a.tar", samples), steps=[1], samples=4)
    fit(training("distillation"), data(captions={"blip": 1, "txt": 1}, filters=Filters()), 1, callbacks=[one])
    assert one.captions == [f"blip {i}" for i in range(4)]


def test_a_reference_cache_that_cannot_be_written_is_refused_before_any_reading(callback, shards, tmp_path):
    (tmp_path / "reference").touch()
    source, one = Source(expand_urls(f"{shards}/val-*.tar")), callback()
    with pytest.raises(UserError, match=r"reference \(.*\): set reference_cache to a writable folder"):
        Extractor(one.backbone, resolution=32).reference(source, one.reference_cache)


def test_measuring_changes_nothing_of_the_training(training, data, fit, callback, tmp_path):
    plain, measured = training("distillation", eval_ema=0.9), training("distillation", eval_ema=0.9)
    fit(plain, data(), 4)
    trainer = fit(measured, data(), 4, callbacks=[callback()])
    for (name, a), (_, b) in zip(plain.state_dict().items(), measured.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert measured.net.training
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not any("clip" in name for name in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])


def test_it_happens_every_n_steps_and_at_the_end_once_each(training, data, fit, callback, monkeypatch):
    one, at = callback(steps=[1]), []
    monkeypatch.setattr(Evaluation, "features", lambda self, trainer, *_: at.append(trainer.global_step) or {})
    monkeypatch.setattr("lcm.evaluate.callback.scores", lambda *_: {"fid": 1.0})
    fit(training("distillation"), data(), 5, callbacks=[one], accumulate_grad_batches=2)
    assert at == [2, 4, 5]


def test_it_needs_held_out_shards(tiny_pipeline):
    options = {"steps": [1], "w": 0.0, "resolution": 32, "reference_cache": "r"}
    with pytest.raises(UserError, match=r"set data\.val_shards"):
        Evaluation(None, backbone=mini_clip(str(tiny_pipeline)), **options)


def test_the_checkpoint_of_the_best_value_is_kept_whatever_the_restarts(training, data, fit, callback, monkeypatch, tmp_path):
    def run(until, values, **options):
        found = iter(values)
        monkeypatch.setattr(Evaluation, "features", lambda *_: {})
        monkeypatch.setattr("lcm.evaluate.callback.scores", lambda *_: {"fid": next(found)})
        one = callback(steps=[4], keep_best="val/fid_4_steps", folder=str(tmp_path))
        last = tmp_path / "last.ckpt"
        fit(training("distillation"), data(), until, callbacks=[one], **options).save_checkpoint(last)
        return last, torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"]

    last, best = run(6, [3.0, 1.0, 2.0])
    assert best == 4
    assert run(8, [1.5], ckpt_path=last)[1] == 4
    assert run(10, [0.5], ckpt_path=last)[1] == 10


def test_best_by_what_is_not_measured_is_a_user_error(training, data, fit, callback):
    with pytest.raises(
        UserError, match=r"keep_best=val/fid is not measured: choose of val/fid_1_steps, val/fid_2_steps, val/cl"
    ):
        fit(training("distillation"), data(), 1, callbacks=[callback(keep_best="val/fid")])
