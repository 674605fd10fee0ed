"""An invalid value of a constructor or a program is refused in one sentence, before anything is loaded."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from omegaconf import OmegaConf

from lcm.app.arguments import check_arguments, fits
from lcm.core.errors import UserError
from lcm.core.losses import huber, l1
from lcm.core.numbers import Count, Limit, Share
from lcm.modules.trainer import Trainer
from tests.conf.programs import REQUIRED, check


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.batch_size=2.5", "data.batch_size=2.5: expected a whole number from 1"),
        ("model.clip_norm=0", "model.clip_norm=0: expected a number above 0 or null"),
        ("model.optimizer.lr=-1", "model.optimizer: AdamW refuses its arguments: Invalid learning rate: -1"),
        ("seed=abc", "seed=abc: expected"),
        ("callbacks.samples.steps=[4,0]", "callbacks.samples.steps=[4, 0]: expected a list in brackets, each a whole"),
        (
            "+callbacks.x={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: a, patience: b}",
            "callbacks.x.patience=b: expected a whole number",
        ),
    ],
)
def test_train_refuses_value(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check("train", override)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("program", "override", "says"),
    [
        ("sample", "dtype=float8", "dtype=float8: expected one of float32, bfloat16, float16"),
        ("evaluate", "entries.LCM.steps=0", "entries.LCM.steps=0: expected a whole number from 1"),
    ],
)
def test_program_refuses_value(program: str, override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check(program, *REQUIRED.get(program, []), override)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.loss.c=0", "model.clip_norm=null", "model.eval_ema=null", "data.codec.cache=false", "+data.flip=true"],
        ["+callbacks.x={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 0}"],
        ["model.optimizer._target_=torch.optim.SGD", "trainer.devices=[0,1]"],
    ],
    ids=" ".join,
)
def test_valid_values_pass(overrides: list[str]) -> None:
    check("train", *overrides)


def test_keys_of_foreign_class_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text(
        "import lightning as L\n\n\nclass Part(L.Callback):\n    def __init__(self, **any): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check("train", "+callbacks.x={_target_: theirs.Part, steps: -1, precision: bf16-true, seed: -3, compile: maybe}")


def test_argument_that_swapped_target_lacks() -> None:
    with pytest.raises(UserError, match=r"torch\.optim\.Muon takes no fused: .* \('~model\.optimizer\.fused' removes it\)"):
        check("train", "model.optimizer._target_=torch.optim.Muon")
    check("train", "model.optimizer._target_=torch.optim.Muon", "~model.optimizer.fused")
    with pytest.raises(UserError, match=r"trainer takes no width: leave it out"):
        check("train", "++trainer.width=512")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere.AdamW8bit", "nowhere.AdamW8bit needs the package nowhere, which is not installed: pip install it"),
        ("torch.optim.AdamWW", "torch.optim.AdamWW cannot be found, did you mean torch.optim.AdamW?"),
        (7, "=7: expected the dotted name of a class or function"),
    ],
)
def test_missing_target(target: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_arguments(OmegaConf.create({"optimizer": {"_target_": target}}), {})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (Count, [1], [0, True, "1", None]),
        (Count | None, [None, 2], [0]),
        (Count | list[Count], [3, [1, 2]], [[1, 0], "x"]),
        (Share, [0.5, 1], [1.5, float("nan")]),
        (Annotated[float, Limit(0, above=True)], [3], [0]),
        (Literal["a", "b"], ["a"], ["c"]),
        (dict[str, int], [{"a": 1}], [{"a": "b"}]),
        (int, [{"_target_": "x"}], ["x"]),
        (torch.Tensor, [[1.0]], ["x"]),
        (Any, ["x", 1, None], []),
    ],
    ids=str,
)
def test_value_fits_annotation(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []


def test_huber_of_width_zero_is_l1() -> None:
    x = torch.tensor([0.0, 2.0, -3.0], requires_grad=True)
    torch.testing.assert_close(huber(x, torch.zeros(3), c=0), l1(x, torch.zeros(3)))
    huber(x, torch.zeros(3), c=0).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_trainer_refuses_precision() -> None:
    with pytest.raises(UserError, match=r"trainer\.precision=16-mixed: .* float16 needs scaled losses, which clipping"):
        Trainer(precision="16-mixed", accelerator="cpu")


def test_missing_gpu_names_the_way_to_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", staticmethod(lambda: False))
    with pytest.raises(UserError, match=r"=gpu: .* on the CPU with trainer=default trainer\.accelerator=cpu$"):
        Trainer(accelerator="gpu")
