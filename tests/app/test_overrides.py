"""A text reaches the configuration as the user types it. A wrong command gives one sentence with the right command."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lcm.app.composition import prepare, single_runs
from lcm.app.overrides import Kind, as_hydra_reads, for_shell, parsed
from lcm.app.sweep_table import shown
from lcm.core.errors import UserError
from tests.conf.programs import check, command, configured

WORDS = ["007", "~"]
SENTENCES = [
    "an orange cat, studio light",
    'a photo, "high quality"',
    "'tis the season, a cat's hat",
    "(a cat:1.2), [a dog], {b}",
    "a: b = c",
    "100 % $5 ${ x",
    "C:\\data\\x",
    "a\nb",
]
KEYS = {
    "train": "name model.pipeline paths.runs ckpt_path? data.shards? +logger.wandb.notes? logger.wandb.project?",
    "sample": "pipeline prompts output?",
    "evaluate": "entries.LCM.pipeline +entries.LCM.label? reference?",
    "encode": "out",
    "export": "run",
}  # a question mark: the key may be null
CHOSEN = {"train": ["logger=wandb"], "encode": ["out=x"], "export": ["run=x"]}


def value(program: str, key: str, text: str) -> Any:
    cfg = configured(program, [*CHOSEN.get(program, []), f"{key}={text}"])
    return OmegaConf.select(cfg, key.lstrip("+"))


@pytest.mark.parametrize("program", KEYS)
def test_key_of_text_takes_words(program: str) -> None:
    keys = {key.strip("+?"): key.endswith("?") for key in KEYS[program].split()}
    for text in ("2024", "null"):
        cfg = configured(program, [*CHOSEN.get(program, []), *(f"{key.rstrip('?')}={text}" for key in KEYS[program].split())])
        values = {key: OmegaConf.select(cfg, key) for key in keys}
        assert values == {key: None if nullable and text == "null" else text for key, nullable in keys.items()}


@pytest.mark.parametrize("text", [*WORDS, *SENTENCES])
def test_quoted_text_is_read_back(text: str) -> None:
    def read(override: str) -> Any:
        reading = parsed(as_hydra_reads(override, lambda key: Kind(True, True), multirun=False))
        assert reading is not None
        return OmegaConf.create({"x": reading.value()}).x

    assert read(f"key={text}") == text
    if "," not in text and "${" not in text:
        assert read(f"key=[{text}, a dog]") == [text, "a dog"]


def test_lists_and_mappings_hold_texts() -> None:
    assert value("sample", "prompts", "an orange cat, studio light") == "an orange cat, studio light"
    assert value("sample", "prompts", "[2024, 007, true, null]") == ["2024", "007", "true", "null"]
    assert value("sample", "prompts", "[a cat's hat, 'a dog, sitting', \"x\"]") == ["a cat's hat", "a dog, sitting", "x"]
    assert value("train", "+logger.wandb.tags", "[1, a]") == ["1", "a"]
    entry = value("evaluate", "+entries.X", "{pipeline: 007, label: 1e-4, steps: [1, 2], w: 3}")
    assert entry == {"pipeline": "007", "label": "1e-4", "steps": [1, 2], "w": 3}


def test_hydra_syntax_stays() -> None:
    assert value("sample", "prompts", "'an orange cat, studio light'") == "an orange cat, studio light"
    assert value("sample", "output", "${pipeline}") == "last"
    assert value("train", "model.optimizer.lr", "1e-4") == 1e-4
    assert value("train", "data.codec.dtype", "null") is None
    assert value("train", "trainer.val_check_interval", "2") == 2  # Lightning allows a number or a text
    assert check("sample", "prompts='a, b'") == ["prompts='a, b'"]  # Lightning starts its other processes with this argument


def test_comma_is_sweep_with_m() -> None:
    [_, override] = check("train", "-m", "name=2024,café,'a, b'")
    runs = [run for [run] in single_runs([override])]
    assert [prepare("train", [run], {"name": str}).args for run in runs] == [[run] for run in runs]
    assert [shown(run) for run in runs] == [("name", "2024"), ("name", "café"), ("name", "a, b")]


REFUSED = [
    ("train", ["model.solver=heun"], "model.solver is a part, choose it with a slash: model/solver=heun"),
    ("train", ["data.filters=aesthetics"], "data.filters is a part, choose it with a slash: +data/filters=aesthetics"),
    ("train", ["callbacks=evaluation", "callbacks.evaluation.backbone=clip"], "backbone@callbacks.evaluation.backbone=clip"),
    ("train", ["model=1"], "there is no config 'model/1'; model has: "),
    ("train", ["model/w_max=8"], "there is no group 'model/w_max', set the key with a dot: model.w_max=8"),
    ("train", ["model/solvr=ddim"], "there is no group 'model/solvr', did you mean 'model/solver'?"),
    ("train", ["model=heun"], "did you mean model/solver=heun?"),
    (
        "train",
        ["data/filters=default"],
        "data/filters is not among the choices of this configuration: append it, +data",
    ),
    ("train", ["callbacks=default", "callbacks.samples.steps=[1,2]"], "callbacks.samples is not chosen: choose it, callbacks="),
    ("train", ["experiment=lcd_mni"], "there is no config 'experiment/lcd_mni', did you mean experiment=lcd_mini?"),
    ("train", ["model/solver="], "model/solver= is empty: choose one of ddim"),
    ("train", ["model/solver=[ddim,heun]"], "model/solver takes one of ddim"),
    ("train", ["-m"], "-m has nothing to sweep"),
    ("train", ["model.w_max=4,8"], 'gives several values: a list needs brackets, "model.w_max=[4,8]"'),
    ("train", ["model/solver=ddim,heun"], "add -m to sweep"),
    ("train", ["-m", "model.w_min=0", "model.w_max=6,x"], "model.w_max=x: expected a number"),
    ("train", ["-m", "model/loss=huber,l2", "model.loss.c=1"], "model.loss.c is no key of model/loss=l2"),
    ("train", ["+width=512"], "nothing reads width: leave it out"),
    ("train", ["+model.width=512"], "ConsistencyModule takes no width"),
    ("train", ["experiment=teacher_mini", "+model/reward=clip"], "LatentModule takes no reward"),
    ("train", ["+callbacks.x.y=512"], "callbacks.x is not chosen: leave the key out"),
    ("train", ["learning_rate=1e-4"], "there is no config key 'learning_rate', did you mean 'model.optimizer.lr'?"),
    ("train", ["trainer.strategy=ddp"], "trainer.strategy has no value yet: if trainer takes it, add it with a plus, +trainer"),
    ("train", ["nothing_like_it=1"], "there is no config key 'nothing_like_it'"),
    ("train", ["model.w_max"], "'model.w_max' sets nothing, did you mean 'model.w_max=...'?"),
    ("train", ["hydra.foo=1"], "Hydra has no key 'hydra.foo'"),
    (
        "train",
        ["hydra.run.dir=/tmp/x"],
        "hydra.run.dir has no effect: set paths.runs, name and paths.run_id",
    ),
    ("train", ["lcd_mini"], "'lcd_mini' sets nothing, did you mean 'experiment=lcd_mini'?"),
    ("train", ["--max_steps=3"], "no option --max_steps=3: overrides have no dashes, did you mean 'trainer.max_steps=3'?"),
    ("train", ["seed=café"], "seed=café cannot be read: a value is a number"),
    ("train", ["~model.nothing"], "'~model.nothing' removes a key that is not there"),
    ("train", ["+model.w_max=3"], "model.w_max is there already: set it without the +"),
    ("evaluate", ["+entries.LCM.foo=1"], "entries.LCM takes no foo"),
]


@pytest.mark.parametrize(("program", "args", "says"), REFUSED, ids=[" ".join(args) for _, args, _ in REFUSED])
def test_refused_command(program: str, args: list[str], says: str) -> None:
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
        [
            "+trainer.limit_train_batches=3",
            "+trainer.strategy=ddp",
            "callbacks=evaluation",
            "+callbacks.evaluation.batch_size=1",
        ],
        ["model.solver=null", "trainer=fsdp", "~callbacks.throughput", "logger=[csv,tensorboard]"],
        ["+callbacks.stopping={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}", "callbacks=default"],
        ["hydra.sweep.dir=/tmp/x", "-m", "seed=1,2"],
        ["+hydra.job.env_set.NCCL_DEBUG=INFO", "hydra.verbose=true"],
    ],
    ids=" ".join,
)
def test_accepted_command(args: list[str]) -> None:
    check("train", *args)


def test_every_run_of_sweep_is_checked() -> None:
    swept = command("train", "-m", "model/solver=ddim,heun", "model.w_max=4,8,9")
    assert [(cfg.model.solver._target_[-4:], cfg.model.w_max) for cfg in swept.runs] == [
        ("ddim", 4), ("heun", 4), ("ddim", 8), ("ddim", 9)
    ]  # fmt: skip
    assert swept.sweep_dir is not None


def test_params_of_sweeper_are_checked(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    args = ["--config-dir", str(tmp_path), "-m", "+search=w"]
    for values in ("6,9", "6,x"):
        text = f"# @package _global_\nhydra: {{sweeper: {{params: {{model.w_max: '{values}', model/solver: 'ddim,heun'}}}}}}\n"
        (tmp_path / "search/w.yaml").write_text(text)
        if "x" not in values:
            assert [cfg.model.w_max for cfg in command("train", *args).runs] == [6, 9, 6]
            continue
        with pytest.raises(UserError, match=r"model\.w_max=x: expected a number"):
            command("train", *args)


def test_own_folder_of_configs(tmp_path: Path) -> None:
    (tmp_path / "model/solver").mkdir(parents=True)
    (tmp_path / "model/solver/mine.yaml").write_text("_target_: lcm.core.solvers.heun\n_partial_: true\n")
    check("train", "--config-dir", str(tmp_path), "model/solver=mine")
    with pytest.raises(UserError, match=r"choose it with a slash: model/solver=mine"):
        check("train", "--config-dir", str(tmp_path), "model.solver=mine")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_override_in_message_can_be_copied(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for text in ("prompts='a cat!'", 'prompts="x"', "prompts='it\\'s $5'", "w=[0,2]", "~entries.DDIM", "a=b c"):
        print_it = [shell, "-c", f"printf %s {for_shell(text)}"]
        assert subprocess.run(print_it, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}).stdout == text
        assert shlex.split(for_shell(text)) == [text]
