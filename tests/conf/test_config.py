"""Every configuration composes and names parameters that exist. Its parts can be built."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from lcm.app.cli import build, expand_home
from lcm.app.composition import compose, plain
from lcm.app.groups import Groups
from lcm.app.inputs import pick_device
from lcm.app.targets import CONF
from lcm.core.errors import UserError
from tests.conf.programs import checked

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
FULL_SIZE = {
    "lcd_sd15": "sd15",
    "lcd_lora_sd15": "sd15",
    "lcd_sd21_768": "sd21",
    "lcd_lora_sdxl": "sdxl",
}
PARTS = ("solver", "loss", "timesteps", "lr_schedule", "optimizer", "net", "process", "objective", "quantization")


def composed(experiment: str, *overrides: str) -> DictConfig:
    return compose("train", [f"experiment={experiment}", *overrides])


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            yield from targets(node._get_node(key), f"{path}.{key}")


def parameters(target: str) -> set[str]:
    """Return the keyword arguments of a target. A class with `**kwargs` also takes the arguments of its base classes."""
    module, _, name = target.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    if not inspect.isclass(thing):
        return set(inspect.signature(thing).parameters)
    names: set[str] = set()
    for cls in thing.__mro__:
        if "__init__" not in vars(cls):
            continue
        signature = inspect.signature(cls.__init__)
        names |= set(signature.parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            return names
    return names


def test_every_experiment() -> None:
    """Each experiment composes, has valid arguments and its own name, and leaves no group empty."""
    flaws = {}
    for experiment in EXPERIMENTS:
        try:
            cfg = checked("train", f"experiment={experiment}")
        except UserError as error:
            flaws[experiment] = str(error)
            continue
        assert cfg.name == experiment
        empty = [part for part in ("data", "model", "trainer", "callbacks") if not cfg[part]]  # an empty `data:` is null
        assert empty == [], experiment
        check_keys(cfg)
    assert flaws == {}


@pytest.mark.parametrize("group", ["data", "data/filters", "callbacks", "callbacks/keep", "logger", "trainer"])
def test_every_option_of_group(group: str) -> None:
    for option in Groups("train").options(group):
        check_keys(checked("train", "experiment=lcd_sd15", f"{group}={option}"))


GPUS = {
    "lcd_lora_sdxl": ("8gb", "12gb", "16gb", "24gb"),
    "lcd_sd15": ("16gb", "24gb"),
    "lcf_lora_sd15": ("8gb",),
    "tdm_lora_sd15": ("8gb", "16gb"),
    "tdm_sd15": ("16gb",),
    "teacher_sd15": ("24gb",),
}


@pytest.mark.parametrize("experiment", GPUS)
def test_one_gpu(experiment: str) -> None:
    for gpu in GPUS[experiment]:
        cfg = checked("train", f"experiment={experiment}", f"gpu={gpu}")
        check_keys(cfg)
        assert (cfg.name, cfg.data.latents, cfg.trainer.get("strategy")) == (experiment, True, None)
        assert cfg.model.optimizer._target_.endswith("AdamW8bit")
        assert cfg.model.gradient_checkpointing


def check_keys(cfg: DictConfig) -> None:
    """Check that each key is a parameter of its node's target. The program's check does not follow a function's `**kwargs`."""
    for path, node in targets(cfg):
        accepted = parameters(node._target_)
        keys = {str(key) for key in node if not str(key).startswith("_")}
        if node._target_.endswith("load_codec"):
            accepted |= parameters("lcm.models.codec.LatentCodec")
        if node._target_.endswith("build_styles"):
            accepted |= parameters("lcm.data.openmoji.build")
        if node._target_.endswith("WandbLogger"):
            accepted |= parameters("wandb.init")
        assert keys <= accepted, f"{path}: {node._target_} takes no {keys - accepted}"


@pytest.mark.parametrize("scale", ["mini", "sd15"])
def test_bench_part_gets_its_arguments(scale):
    cfg = compose("bench", [f"scale={scale}"])
    for overrides in (cfg.lcd, cfg.teacher):
        compose("train", list(overrides))
    for node in cfg.part.values():
        assert {str(key) for key in node if not str(key).startswith("_")} == parameters(node._target_)


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("evaluate", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
        ("encode", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")),
    ],
    ids=["torchrun", "srun"],
)
def test_rank_and_gpu_of_program(program, names, monkeypatch):
    for name, value in zip(names, ("5", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    cfg = compose(program, [])
    assert (cfg.rank, cfg.world_size, cfg.local_rank) == (5, 8, 1)
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert pick_device("auto", cfg.local_rank) == "cuda"
    assert chosen == [1]


@pytest.mark.parametrize("group", PARTS)
def test_every_part_can_be_built(group: str) -> None:
    base = {"net": "teacher_mini", "process": "teacher_mini"}.get(group, "lcd_mini")
    for option in Groups("train").options(f"model/{group}"):
        if option == "pipeline":
            continue
        cfg = composed(base, f"model/{group}={option}")
        with torch.device("meta"):
            assert (part := build(cfg.model[group])) is not None
        if group == "timesteps":
            assert len(part(1000))


@pytest.mark.parametrize(("experiment", "net"), FULL_SIZE.items())
def test_full_size_recipe_has_real_shapes(experiment, net, tiny_pipeline, xl_pipeline):
    pipeline = xl_pipeline if net == "sdxl" else tiny_pipeline
    model = composed(experiment, f"model/net={net}", "model/process=vp", f"model.pipeline={pipeline}").model
    with torch.device("meta"):
        network = build(model.net)
        network.register_to_config(_name_or_path=str(pipeline / "unet"))  # as if it were loaded from there
        module = build({**plain(model), "net": network})
    teacher = module.frozen.get("teacher", module.net)
    shapes = {name: tuple(p.shape) for name, p in teacher.named_parameters()}
    shapes.pop("time_embedding.cond_proj.weight", None)
    tensors, weights, context, adapters = {
        "sd15": (686, 859_520_964, 768, 67_252_224),
        "sd21": (686, 865_910_724, 1024, None),
        "sdxl": (1680, 2_567_463_684, 2048, 196_751_360),
    }[net]
    assert len(shapes) == tensors
    assert sum(torch.Size(s).numel() for s in shapes.values()) == weights
    assert shapes["conv_in.weight"] == (320, 4, 3, 3)
    if net != "sdxl":
        assert shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (320, context)
    assert shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"] == (1280, context)
    if "lora" in experiment:
        assert sum(p.numel() for p in module.parameters() if p.requires_grad) == adapters
    else:
        assert module.net.time_embedding.cond_proj.weight.shape == (320, 256)


def test_full_size_recipe_has_paper_numbers():
    cfg = composed("lcd_sd15")
    model = cfg.model
    assert (model.w_min, model.w_max, model.ema_decay, model.objective.skip_steps) == (2.0, 14.0, 0.999943, 20)
    assert model.optimizer.lr == 8e-6
    assert cfg.trainer.max_steps == 100_000
    assert model.solver._target_.endswith(".ddim")
    assert model.loss._target_.endswith(".l2")


def test_default_is_mini_distillation():
    assert compose("train", []) == composed("lcd_mini")


def test_no_secret_in_conf():
    for path in Path(CONF).rglob("*.yaml"):
        assert "API_KEY" not in path.read_text(), path


HOMES = {
    "train": "data=shards data.shards model.pipeline ckpt_path paths.runs paths.data data.val_shards data.filters.removal_list",
    "sample": "pipeline output val_shards paths.runs cache.folder prompts",
    "evaluate": "shards reference output features reference_cache backbone.pipeline prompts",
    "encode": "out data.shards data.codec.pipeline data.index",
    "export": "run checkpoint output",
    "preview": "output data.shards",
}


def test_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for program, words in HOMES.items():
        keys = [word for word in words.split() if "=" not in word]
        cfg = compose(program, [f"{word}='~/my files/a.txt'" if word in keys else word for word in words.split()])
        expand_home(cfg)
        assert {key: OmegaConf.select(cfg, key) for key in keys} == dict.fromkeys(keys, "/home/me/my files/a.txt"), program


def test_home_folder_of_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    cfg = compose("train", ["paths.runs='~/runs'"], return_hydra_config=True)
    assert cfg.hydra.sweep.dir.startswith("/home/me/runs/sweeps/")


def test_home_folder_in_lists_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("LCM_DATA", "~/data")
    cfg = compose(
        "evaluate", ["+entries.X={pipeline: '~/a'}", "+sources=[{urls: '~/b/*.tar'}]", "prompts=['~/c ~']", "output='~'"]
    )
    expand_home(cfg)
    assert (cfg.entries.X.pipeline, cfg.sources[0].urls, list(cfg.prompts)) == ("/home/me/a", "/home/me/b/*.tar", ["~/c ~"])
    assert (cfg.reference_cache, cfg.features, cfg.paths.run_dir) == (
        "/home/me/data/reference",
        "/home/me/features",
        "/home/me",
    )


def test_missing_and_unknown_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown device=foo: use auto, cuda"):
        pick_device("foo")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=mps, but torch sees no Apple GPU: use device=cpu"):
        pick_device("mps")
