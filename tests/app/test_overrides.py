"""What a user types is what the program gets, and where it cannot be, one sentence says what to type."""

import os
import shlex
import shutil
import subprocess
from typing import Any

import pytest
from omegaconf import OmegaConf

from lcm.app.composition import prepare, single_runs
from lcm.app.overrides import for_shell
from lcm.app.sweep_table import shown
from lcm.core.errors import UserError
from tests.conf.programs import check, configured

WORDS = [
    "2024",
    "007",
    "1e-4",
    "true",
    "null",
    "off",
    "0x10",
    "1_000",
    "2026-11-28",
    "nan",
    "-3",
    "1.",
    "None",
    "~",
    "12:30:00",
]
SENTENCES = [
    "an orange cat, studio light",
    'a photo, "high quality"',
    "it's a circle",
    "'tis the season, a cat's hat",
    "café crème",
    "红苹果 绿苹果",
    "🍎 & 🍏",
    "a cat!",
    "#1 cat",
    "~/pictures/a",
    "me@home",
    "(a cat:1.2), [a dog], {b}",
    "a: b = c",
    "100 % $5 ${ x",
    "C:\\data\\x",
    "a\nb",
    "/data/a,b/{00..10}.tar",
]
KEYS = [
    ("train", "name"),
    ("train", "model.pipeline"),
    ("train", "ckpt_path"),
    ("train", "data.shards"),
    ("train", "paths.runs"),
    ("train", "paths.run_id"),
    ("train", "logger.wandb.project"),
    ("train", "+logger.wandb.notes"),
    ("train", "+logger.wandb.group"),
    ("sample", "pipeline"),
    ("sample", "prompts"),
    ("sample", "output"),
    ("evaluate", "entries.LCM.pipeline"),
    ("evaluate", "+entries.LCM.label"),
    ("evaluate", "reference"),
    ("encode", "out"),
    ("export", "run"),
    ("bench", "pipeline"),
]
CHOSEN = {"train": ["logger=wandb"], "encode": ["out=x"], "export": ["run=x"]}
NULLABLE = {"ckpt_path", "data.shards", "paths.run_id", "reference", "output", "+logger.wandb.notes", "+logger.wandb.group"}
NULLABLE |= {"+entries.LCM.label", "logger.wandb.project"}


def value(program: str, key: str, text: str) -> Any:
    cfg = configured(program, [*CHOSEN.get(program, []), f"{key}={text}"])
    return OmegaConf.select(cfg, key.lstrip("+"))


@pytest.mark.parametrize(("program", "key"), KEYS, ids=lambda name: name)
def test_a_word_that_yaml_reads_as_something_else_is_the_text_that_was_typed(program: str, key: str) -> None:
    for word in ("2024", "1e-4"):
        assert value(program, key, word) == word
    assert value(program, key, "null") == (None if key in NULLABLE else "null")


@pytest.mark.parametrize("text", [*WORDS, *SENTENCES])
def test_text_arrives_as_it_was_typed(text: str) -> None:
    assert value("sample", "prompts", text) == text
    if "," not in text and "${" not in text:
        assert value("sample", "prompts", f"[{text}, a dog]") == [text, "a dog"]


def test_elements_of_lists_and_mappings_are_texts_too() -> None:
    assert value("sample", "prompts", "[2024, 007, true, null]") == ["2024", "007", "true", "null"]
    assert value("sample", "prompts", "[a cat's hat, 'a dog, sitting', \"x\"]") == ["a cat's hat", "a dog, sitting", "x"]
    assert value("train", "+logger.wandb.tags", "[1, a]") == ["1", "a"]
    entry = value("evaluate", "+entries.X", "{pipeline: 007, label: 1e-4, steps: [1, 2], w: 3}")
    assert entry == {"pipeline": "007", "label": "1e-4", "steps": [1, 2], "w": 3}


def test_what_hydra_s_own_grammar_says_stays() -> None:
    assert value("sample", "prompts", "'an orange cat, studio light'") == "an orange cat, studio light"
    assert value("sample", "output", "${pipeline}") == "last"
    assert value("train", "model.optimizer.lr", "1e-4") == 1e-4
    assert value("train", "data.codec.dtype", "null") is None
    assert value("train", "trainer.val_check_interval", "2") == 2  # a number or text, says Lightning
    assert check("sample", "prompts='a, b'") == ["prompts='a, b'"]  # Lightning starts its other processes with it


def test_with_m_a_comma_is_a_sweep_of_texts() -> None:
    [_, override] = check("train", "-m", "name=2024,café,'a, b'")
    runs = [run for [run] in single_runs([override])]
    assert [prepare("train", [run], {"name": str})[0] for run in runs] == [[run] for run in runs]
    assert [shown(run) for run in runs] == [("name", "2024"), ("name", "café"), ("name", "a, b")]


REFUSED = [
    ("train", ["model.solver=heun"], "model.solver is a part, and a slash swaps it: model/solver=heun"),
    ("train", ["model.loss=l2"], "model/loss=l2"),
    ("train", ["data.filters=aesthetics_6"], "+data/filters=aesthetics_6"),
    ("train", ["trainer.strategy=fsdp"], "+trainer/strategy=fsdp"),
    ("train", ["callbacks=evaluation", "callbacks.evaluation.backbone=clip"], "backbone@callbacks.evaluation.backbone=clip"),
    ("train", ["model.solver=ddmi"], "by one of ddim, dpm_solver_2"),
    ("train", ["model.optimizer=adam"], "model/optimizer=<name>"),
    ("train", ["model/w_max=8"], "did you mean 'model.w_max'?"),
    ("train", ["model=heun"], "did you mean model/solver=heun?"),
    ("train", ["+model/nothing=8"], "there is no group 'model/nothing'"),
    ("train", ["callbacks=default", "callbacks.samples.steps=[1,2]"], "choose it, callbacks=samples"),
    ("train", ["callbacks=default", "callbacks.samples.every_n_steps=5"], "choose it, callbacks=samples"),
    ("train", ["callbacks.evaluation.samples=9"], "choose it, callbacks=evaluation"),
    ("train", ["logger.wandb.project=x"], "choose it, logger="),
    ("train", ["experiment=teacher_mini", "model.w_min=2"], "model.w_min is no key of model=diffusion"),
    ("train", ["experiment=lcd_mni"], "did you mean experiment=lcd_mini?"),
    ("train", ["model/solver="], "model/solver= chooses nothing; model/solver has: ddim"),
    ("train", ["experiment="], "experiment= chooses nothing"),
    ("train", ["model/solver=[ddim,heun]"], "not a list"),
    ("train", ["-m"], "-m has nothing to sweep"),
    ("train", ["--multirun", "name=a"], "-m has nothing to sweep"),
    ("train", ["model.w_max=4,8"], "gives several values: a list needs brackets"),
    ("train", ["model/solver=ddim,heun"], "add -m to sweep"),
    ("train", ["model.w_max=choice(4,8)"], "add -m to sweep"),
    ("train", ["+width=512"], "nothing reads width: leave it out"),
    ("train", ["++trainer.width=512"], "trainer takes no width"),
    ("train", ["+model.width=512"], "ConsistencyModule takes no width"),
    ("train", ["+paths.width=512"], "paths takes no width"),
    ("train", ["+callbacks.x.y=512"], "callbacks.x"),
    ("train", ["+learning_rate=1e-4"], "did you mean 'model.optimizer.lr'?"),
    ("train", ["learning_rate=1e-4"], "did you mean 'model.optimizer.lr'?"),
    ("train", ["trainer.strategy=ddp"], "add it with a plus, +trainer.strategy="),
    ("train", ["lr=1e-4"], "did you mean 'model.optimizer.lr'?"),
    ("train", ["batch_size=4"], "did you mean 'data.batch_size'?"),
    ("train", ["batchsize=4"], "did you mean 'data.batch_size'?"),
    ("train", ["workers=4"], "did you mean 'data.num_workers'?"),
    ("train", ["model.w_max"], "'model.w_max' sets nothing"),
    ("train", ["seed=café"], "seed=café cannot be read"),
    ("train", ["model.w_max==3"], "model.w_max==3 cannot be read"),
    ("train", ["~model.nothing"], "'~model.nothing' removes a key that is not there"),
    ("train", ["+model.w_max=3"], "model.w_max is there already: set it without the +"),
    ("sample", ["prompt=cat"], "did you mean 'prompts'?"),
    ("sample", ["num_inference_steps=4"], "did you mean 'steps'?"),
    ("sample", ["+width=64"], "nothing reads width"),
    ("evaluate", ["w=0,2"], '"w=[0,2]"'),
    ("evaluate", ["+entries.LCM.foo=1"], "entries.LCM takes no foo"),
    ("evaluate", ["~entries.DDMI"], "did you mean '~entries.DDIM'?"),
]


@pytest.mark.parametrize(("program", "args", "says"), REFUSED, ids=[" ".join(args) for _, args, _ in REFUSED])
def test_a_command_that_cannot_be_meant_is_one_sentence(program: str, args: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        check(program, *args)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hydra.cc" not in str(caught.value)


@pytest.mark.parametrize(
    "args",
    [
        ["experiment=lcd_mini.yaml"],
        ["+base=3", "model.w_max=${base}"],
        ["data=shards", "+data.timeout=60", "data.sources=[{urls: a/*.tar, weight: 3}]", "data.captions={txt: 1, blip: 3}"],
        ["+trainer.limit_train_batches=3", "+trainer.strategy=ddp"],
        ["model.solver=null"],
        ["logger=[csv,tensorboard]"],
        ["trainer=fsdp", "data.codec=null"],
        ["-m", "model/solver=ddim,heun", "model.w_max=4,8"],
        ["+callbacks.stopping={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}", "callbacks=default"],
        ["hydra.sweep.dir=/tmp/x", "-m", "seed=1,2"],
    ],
    ids=" ".join,
)
def test_a_command_that_can_be_meant_passes(args: list[str]) -> None:
    check("train", *args)


def test_a_folder_of_the_user_s_own_configs_may_hold_groups_and_choices(tmp_path: Any) -> None:
    (tmp_path / "model/solver").mkdir(parents=True)
    (tmp_path / "model/solver/mine.yaml").write_text("_target_: lcm.core.solvers.heun\n_partial_: true\n")
    check("train", "--config-dir", str(tmp_path), "model/solver=mine")
    with pytest.raises(UserError, match=r"a slash swaps it: model/solver=mine"):
        check("train", "--config-dir", str(tmp_path), "model.solver=mine")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    "text", ["prompts='a cat!'", 'prompts="x"', "prompts='it\\'s $5'", "w=[0,2]", "~entries.DDIM", "a=b c"]
)
def test_an_override_in_a_message_can_be_copied_into_a_shell(shell: str, text: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = [shell, "-c", f"printf %s {for_shell(text)}"]
    assert subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}).stdout == text
    assert shlex.split(for_shell(text)) == [text]
