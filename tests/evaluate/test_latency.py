"""The latency is in seconds per image. It covers all work from prompt to pixels, without the warm-up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcm.evaluate.latency import Latency


def test_median_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, durations, calls = [0.0], iter([100.0, 6.0, 9.0, 4.0]), []

    def images(prompts: list[str], seeds: list[int], **options: Any) -> Any:
        calls.append((prompts, options))
        clock[0] += next(durations)  # the time of text encoder, network and decoder
        yield torch.zeros(len(prompts), 3, 8, 8)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    job: Any = SimpleNamespace(model=SimpleNamespace(images=images), options={"steps": 4, "w": 2.0})
    assert Latency("s", batch_size=2, repeats=3).measure(job, "a cat") == 3.0
    assert calls == [(["a cat"] * 2, {"batch_size": 2, "steps": 4, "w": 2.0})] * 4
