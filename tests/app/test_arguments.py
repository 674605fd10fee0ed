"""Each constructor and program says what it takes; a value that it cannot take is one sentence, before anything is loaded."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from omegaconf import OmegaConf

from lcm.app.arguments import check_arguments, fits
from lcm.app.targets import CONF
from lcm.core.errors import UserError
from lcm.core.losses import huber, l1
from lcm.core.numbers import Count, Limit, Share
from lcm.modules.trainer import Trainer
from tests.conf.programs import PROGRAMS, check

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
REQUIRED = {"encode": ["out=x"], "export": ["run=x"]}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_passes(experiment: str) -> None:
    check("train", f"experiment={experiment}", "callbacks=best", "callbacks/keep=every", "logger=[csv,tensorboard,wandb]")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_s_defaults_pass(program: str) -> None:
    check(program, *REQUIRED.get(program, []))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("data.batch_size=0", "data.batch_size=0: expected a whole number from 1"),
        ("data.batch_size=2.5", "data.batch_size=2.5: expected a whole number from 1"),
        ("data.batch_size=", "data.batch_size=: expected a whole number from 1"),
        ("data.batch_size=null", "data.batch_size=null: expected a whole number from 1"),
        ("data.num_workers=-1", "data.num_workers=-1: expected a whole number from 0"),
        ("data.caption_dropout=1.5", "data.caption_dropout=1.5: expected a number from 0 to 1"),
        ("model.clip_norm=0", "model.clip_norm=0: expected a number above 0 or null"),
        ("model.optimizer.lr=-1", "model.optimizer: AdamW refuses its arguments: Invalid learning rate: -1"),
        ("model.optimizer.lr=nan", "model.optimizer.lr=nan: expected a number"),
        ("model.optimizer.lr=abc", "model.optimizer.lr=abc: expected a number"),
        ("seed=-1", "seed=-1: expected a whole number from 0 to 4294967295"),
        ("seed=true", "seed=true: expected a whole number from 0 to 4294967295"),
        ("seed=abc", "seed=abc: expected"),  # model.seed takes its value from it
        ("model.compile=yess", "model.compile=yess: expected true or false"),
        ("callbacks.samples.steps=[4,0]", "callbacks.samples.steps=[4, 0]: expected a list in brackets, each a whole"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0: expected a whole number from 1"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0: expected a whole number from 1"),
        ("model.objective.skip_steps=2000", "model.objective.skip_steps=2000: expected a whole number from 1 to 1000"),
        ("model.loss._target_=lcm.core.losses.cauchy model.loss.c=0", "model.loss.c=0: expected a number above 0"),
        ("name=[a]", "name=['a']: expected text"),
        ("+callbacks.x={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: a, patience: b}", "a whole number"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_refused(args: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check("train", *(args.split(" ") if "{" not in args else [args]))
    assert str(caught.value).startswith(says) or says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("program", "override", "says"),
    [
        ("sample", "images_per_prompt=0", "images_per_prompt=0: expected a whole number from 1"),
        ("sample", "dtype=float8", "dtype=float8: choose among float32, bfloat16, float16"),
        ("evaluate", "samples=1", "samples=1: expected a whole number from 2"),
        ("evaluate", "metrics=fid", "metrics=fid: expected a list in brackets, each text"),
        ("evaluate", "entries.LCM.steps=0", "entries.LCM.steps=0: expected a whole number from 1"),
        ("encode", "crops=0", "crops=0: expected a whole number from 1"),
        ("preview", "samples=x", "samples=x: expected a whole number from 1"),
        ("manifest", "verify=maybe", "verify=maybe: expected true or false"),
        ("bench", "part.data.repeats=x", "part.data.repeats=x: expected a whole number"),
    ],
)
def test_a_program_says_what_it_takes(program: str, override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check(program, *REQUIRED.get(program, []), override)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.loss.c=0"],
        ["+callbacks.x={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 0}"],
        ["+callbacks.x={_target_: lightning.pytorch.callbacks.Timer, interval: step}"],
        ["model.optimizer._target_=torch.optim.SGD"],
        ["model.clip_norm=null", "model.eval_ema=null"],
        ["trainer.devices=auto"],
        ["trainer.devices=[0,1]"],
        ["data.flip=true", "data.codec.cache=false"],
    ],
    ids=" ".join,
)
def test_the_innocent_pass(overrides: list[str]) -> None:
    added = [f"+{override}" if override.startswith("data.flip") else override for override in overrides]
    check("train", *added)


def test_names_of_a_third_party_s_keys_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text(
        "import lightning as L\n\n\nclass Part(L.Callback):\n    def __init__(self, **any): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check(
        "train", "+callbacks.x={_target_: theirs.Part, steps: -1, patience: 0, precision: bf16-true, seed: -3, compile: maybe}"
    )


def test_huber_without_a_width_is_l1_with_a_gradient_where_both_agree() -> None:
    x = torch.tensor([0.0, 2.0, -3.0], requires_grad=True)
    torch.testing.assert_close(huber(x, torch.zeros(3), c=0), l1(x, torch.zeros(3)))
    huber(x, torch.zeros(3), c=0).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "16-true", "64-true", "8"])
def test_a_precision_that_the_modules_cannot_train_in_is_refused_with_the_reason(precision: str) -> None:
    with pytest.raises(UserError, match=rf"trainer\.precision={precision}: .* float16 would scale the losses that are clipped"):
        Trainer(precision=precision, accelerator="cpu")


@pytest.mark.parametrize(
    ("value", "hint", "holds"),
    [
        (1, Count, True), (0, Count, False), (True, Count, False), ("1", Count, False), (None, Count | None, True),
        ([1, 2], Count | list[Count], True), ([1, 0], Count | list[Count], False), (0.5, Share, True), (1, Share, True),
        (float("nan"), float, False), ("a", Literal["a", "b"], True), ("c", Literal["a", "b"], False), ("c", Any, True),
        (3, Annotated[float, Limit(0, above=True)], True), ({"_target_": "x"}, int, True), ({"a": 1}, dict[str, int], True),
        ({"a": "b"}, dict[str, int], False), ("x", torch.Tensor, False),
    ],
)  # fmt: skip
def test_a_value_fits_an_annotation(value: Any, hint: Any, holds: bool) -> None:
    assert fits(value, hint) is holds


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (
            "nowhere.optim.AdamW8bit",
            "nowhere.optim.AdamW8bit needs the package nowhere, which is not installed: pip install it",
        ),
        ("torch.optim.AdamWW", "torch.optim.AdamWW cannot be found, did you mean torch.optim.AdamW?"),
        (7, "=7: expected the dotted name of a class or function"),
    ],
)
def test_a_target_that_is_not_there_is_one_sentence(target: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_arguments(OmegaConf.create({"optimizer": {"_target_": target}}), {})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_argument_that_a_swapped_target_does_not_take_is_named_with_the_way_to_remove_it() -> None:
    with pytest.raises(UserError, match=r"torch\.optim\.Muon takes no fused: .* \('~model\.optimizer\.fused' removes it\)"):
        check("train", "model.optimizer._target_=torch.optim.Muon")
    check("train", "model.optimizer._target_=torch.optim.Muon", "~model.optimizer.fused")
