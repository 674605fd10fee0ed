"""The default precision is bfloat16 only on hardware that is fast in bfloat16."""

from pathlib import Path

import pytest
import torch

from lcm.app import resolvers
from lcm.app.composition import compose


def test_bfloat16_on_cpu(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert not resolvers.bfloat16_is_fast("cpu", str(file))
    for text, fast in (
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_tile amx_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
    ):
        file.write_text(text)
        assert resolvers.bfloat16_is_fast("cpu", str(file)) == fast


def test_bfloat16_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert resolvers.fast_precision("gpu") == ("bf16-mixed" if has else "32-true")
        assert resolvers.fast_dtype("auto") == ("bfloat16" if has else "float32")


def test_precision_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, names in ((True, ("bf16-mixed", "bfloat16")), (False, ("32-true", "float32"))):
        monkeypatch.setattr(resolvers, "bfloat16_is_fast", lambda device, fast=fast: fast)
        cfg = compose("train", ["experiment=lcd_mini"])
        assert (cfg.trainer.precision, cfg.data.codec.dtype) == names
        assert compose("evaluate", []).dtype == names[1]
        assert compose("train", ["trainer.precision=32-true"]).trainer.precision == "32-true"
