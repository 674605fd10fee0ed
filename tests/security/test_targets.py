"""What a configuration may name is built, and nothing else, wherever it stands."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lcm import targets
from lcm.command_line import build, refuse
from lcm.composition import check_overrides
from lcm.errors import UserError

REFUSED = [
    "lcm.core.process.VP.at",
    "lcm.models.generate.LatentModel.load",
    "os.system",
    "builtins.eval",
    "builtins.print",
    "subprocess.Popen",
    "torch.load",
    "torch.hub.load",
    "torch.os.system",
    "torch.nn.modules.module.torch.load",
    "torch.optim.optimizer.functools.partial",
    "torch.optim.Optimizer.step",
    "torch.utils.cpp_extension.load",
    "lcm.runs.os.system",
    "lcm.core.ema.torch.load",
    "lcm.data.remote.run",
    "lcm.models.saving.save_pipeline",
    "lcm.models.saving.shutil.rmtree",
    "lcm.callbacks.sweep.hide_secrets",
    "diffusers.DiffusionPipeline.from_pretrained",
    "diffusers.UNet2DConditionModel.from_pretrained",
    "diffusers.DiffusionPipeline",
    "transformers.AutoModel.from_pretrained",
    "lightning.pytorch.cli.LightningCLI",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks.Checkpoint.__init__",
    "hydra.utils.instantiate",
    "hydra.utils.get_method",
    "lightning",
    "nowhere.at.all",
    "lcm.core.nothing",
    "lcm_core.x",
    "",
    None,
    7,
]
ALLOWED = [
    "torch.optim.SGD",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "torch.nn.SiLU",
    "lcm.core.losses.huber",
    "lcm.callbacks.samples.ImageGrid",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.strategies.DDPStrategy",
    "lightning.pytorch.plugins.environments.SLURMEnvironment",
    "lightning.pytorch.loggers.MLFlowLogger",
    "diffusers.UNet2DModel",
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
]


@pytest.mark.parametrize("target", REFUSED)
def test_what_could_run_anything_is_refused(target: Any) -> None:
    with pytest.raises(UserError, match=r"is not allowed: .* set LCM_ALLOW_TARGETS=<package>$"):
        targets.check_target(target, "model.solver._target_")


@pytest.mark.parametrize("target", [*ALLOWED, *sorted(targets.shipped())])
def test_what_a_training_is_made_of_is_allowed(target: str) -> None:
    targets.check_target(target, "model.solver._target_")


def test_a_refused_package_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError):
        targets.check_target("hostile.Callback", "callbacks.x._target_")
    assert not (tmp_path / "ran").exists()


def test_a_package_of_ones_own_is_allowed_by_name_but_not_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("import os\ndef solver(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("LCM_ALLOW_TARGETS", "other, mine")
        importlib.reload(targets)
        assert build({"_target_": "mine.solver"}) == 1
        for name in ("mine.os.system", "os.system"):
            with pytest.raises(UserError, match="is not allowed"):
                build({"_target_": name})
    importlib.reload(targets)
    with pytest.raises(UserError, match=r"mine\.solver is not allowed"):
        build({"_target_": "mine.solver"})


def test_a_configuration_cannot_allow_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCM_ALLOW_TARGETS", "os")  # as hydra.job.env_set would, once Hydra runs
    with pytest.raises(UserError, match="is not allowed"):
        build({"_target_": "os.getcwd"})


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.getcwd"},
        {"_target_": "os.getcwd", "_partial_": True},
        {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.getcwd"}]},
        {"_target_": "torch.nn.SiLU", "_recursive_": False, "inner": {"deep": [{"_target_": "os.getcwd"}]}},
        [{"plugins": {"_target_": "os.getcwd"}}],
        {"name": "os.getcwd", "_target_": "${.name}"},
        {"_target_": "torch.nn.Sequential", "_args_": ["${oc.create:'{_target_: os.getcwd}'}"]},
    ],
    ids=["plain", "partial", "argument", "deep", "list", "interpolated", "made"],
)
@pytest.mark.parametrize("kind", ["plain", "config"])
def test_nothing_is_built_around_or_inside(node: Any, kind: str) -> None:
    with pytest.raises(UserError, match=r"os\.getcwd is not allowed"):
        build(OmegaConf.create(node) if kind == "config" else node)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["model.solver._target_=os.system"], "model.solver._target_=os.system is not allowed"),
        (["-m", "model.solver._target_=lcm.core.solvers.heun,os.system"], "model.solver._target_=os.system"),
        (["+callbacks.x={_target_:os.system}"], "callbacks.x._target_=os.system"),
        (["+trainer.plugins=[{_target_:os.system}]"], "trainer.plugins.0._target_=os.system"),
        (["+hydra.callbacks.x._target_=os.system"], "hydra.callbacks.x._target_=os.system"),
        (["+hydra.callbacks.x._target_=${model.evil}", "+model.evil=os.system"], "hydra.callbacks.x._target_=os.system"),
        (["+hydra.callbacks.x._target_=${model.none}"], "hydra.callbacks.x._target_=None"),
        (["hydra.sweeper._target_=os.system"], "hydra.sweeper._target_=os.system"),
        (["+hydra.launcher.x._target_=os.system"], "hydra.launcher.x._target_=os.system"),
        (["hydra.hydra_logging.handlers.console.class=os.system"], "hydra.hydra_logging.handlers.console.class=os.system"),
        (["hydra.job_logging.handlers.console.stream=ext://os.environ"], "a log goes to ext://sys.stdout"),
        (["hydra.output_subdir=.hydra"], "leave it null"),
        (["--help", "hydra.sweeper._target_=os.system"], "hydra.sweeper._target_=os.system"),
        (["--experimental-rerun", "x.pickle"], "unpickles a file"),
        (["--config-path", "/tmp"], "replaces conf/"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_whole_command_line_is_checked_before_hydra_runs(args: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_overrides("train", args)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_ones_own_configs_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "model/solver").mkdir(parents=True)
    (tmp_path / "model/solver/mine.yaml").write_text("_target_: lcm.core.solvers.heun\n_partial_: true\n")
    (tmp_path / "model/solver/evil.yaml").write_text("_target_: os.system\n")
    check_overrides("train", ["--config-dir", str(tmp_path), "model/solver=mine"])
    with pytest.raises(UserError, match=r"model\.solver\._target_=os\.system is not allowed"):
        check_overrides("train", ["--config-dir", str(tmp_path), "model/solver=evil"])
    (tmp_path / "hydra/job_logging").mkdir(parents=True)
    (tmp_path / "hydra/job_logging/evil.yaml").write_text("formatters: {x: {(): lcm.data.remote.run, command: id}}\nroot: {}\n")
    with pytest.raises(UserError, match=r"hydra\.job_logging\.formatters\.x\.\(\)=lcm\.data\.remote\.run is not allowed"):
        check_overrides("train", ["--config-dir", str(tmp_path), "hydra/job_logging=evil"])


@pytest.mark.parametrize("args", [["--cfg", "job"], ["--help"], ["--info", "all"], ["hydra.job_logging.root.level=DEBUG"]])
def test_hydra_answers_as_before(args: list[str]) -> None:
    check_overrides("train", args)


@pytest.mark.parametrize(
    "override", ["+note={token:planted", "model.planted_token=planted", "model.x='https://planted@host/?planted'"]
)
def test_a_complaint_about_an_override_holds_no_secret(override: str) -> None:
    with pytest.raises(UserError) as raised:
        check_overrides("train", [override, "model.nothing=1"])
    with pytest.raises(SystemExit) as caught:
        refuse(raised.value)
    assert "=planted" not in str(caught.value)
    assert "//planted" not in str(caught.value)
