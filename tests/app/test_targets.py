"""An untrusted configuration may name parts of a training only. The user's own configuration is trusted."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lcm.app import targets
from lcm.app.arguments import check_arguments
from lcm.app.cli import build, refuse
from lcm.app.composition import prepare
from lcm.core.errors import UserError
from lcm.export import trained
from lcm.runtime.checkpoint_io import AtomicCheckpointIO

REFUSED = {
    "other packages": ["os.system", "builtins.eval", "subprocess.Popen", "transformers.AutoModel.from_pretrained"],
    "hydra": ["hydra.utils.instantiate", "hydra.utils.get_method"],
    "functions of allowed packages": ["torch.load", "torch.hub.load", "torch.utils.cpp_extension.load"],
    "modules seen through others": [
        *("torch.os.system", "torch.nn.modules.module.torch.load", "torch.optim.optimizer.functools.partial"),
        *("lcm.runtime.run_dir.os.system", "lcm.core.ema.torch.load", "lcm.models.saving.shutil.rmtree"),
    ],
    "own functions": [
        "lcm.data.fetch.output_of",
        "lcm.models.saving.save_pipeline",
        "lcm.app.sweep_table.hide_secrets",
    ],
    "methods": [
        *("lcm.core.process.VP.at", "lcm.models.text_to_image.TextToImage.load", "torch.optim.Optimizer.step"),
        *("diffusers.UNet2DConditionModel.from_pretrained", "lightning.pytorch.callbacks.Checkpoint.__init__"),
    ],
    "classes": [
        "diffusers.DiffusionPipeline",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.pytorch.Trainer",
    ],
    "nothing there": ["lightning", "nowhere.at.all", "lcm.core.nothing", "lcm_core.x", "", None, 7],
}
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
]


@pytest.mark.parametrize("kind", REFUSED)
def test_target_refused(kind: str) -> None:
    for target in REFUSED[kind]:
        with pytest.raises(UserError, match=r"is not allowed: .* set LCM_ALLOW_TARGETS=<package>$"):
            targets.check_target(target, "model.solver._target_")


def test_target_allowed() -> None:
    for target in [*ALLOWED, *sorted(targets.shipped())]:
        targets.check_target(target, "model.solver._target_")


def test_refused_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError):
        targets.check_target("hostile.Callback", "callbacks.x._target_")
    assert not (tmp_path / "ran").exists()


def test_own_package_is_allowed_without_its_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("import os\ndef solver(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("LCM_ALLOW_TARGETS", "other, mine")
        importlib.reload(targets)
        assert build({"_target_": "mine.solver"}, foreign=True) == 1
        for name in ("mine.os.system", "os.system"):
            with pytest.raises(UserError, match="is not allowed"):
                build({"_target_": name}, foreign=True)
    importlib.reload(targets)
    with pytest.raises(UserError, match=r"mine\.solver is not allowed"):
        build({"_target_": "mine.solver"}, foreign=True)


def test_configuration_cannot_allow_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCM_ALLOW_TARGETS", "os")  # hydra.job.env_set does the same once Hydra runs
    with pytest.raises(UserError, match="is not allowed"):
        build({"_target_": "os.getcwd"}, foreign=True)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.getcwd"},
        {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.getcwd"}]},
        {"_target_": "torch.nn.SiLU", "_recursive_": False, "inner": {"deep": [{"_target_": "os.getcwd"}]}},
        [{"plugins": {"_target_": "os.getcwd"}}],
        {"name": "os.getcwd", "_target_": "${.name}"},
        {"_target_": "torch.nn.Sequential", "_args_": ["${oc.create:'{_target_: os.getcwd}'}"]},
    ],
    ids=["plain", "argument", "deep", "list", "interpolated", "made"],
)
def test_foreign_node_builds_nothing(node: Any) -> None:
    for same in (node, OmegaConf.create(node)):
        with pytest.raises(UserError, match=r"os\.getcwd is not allowed"):
            build(same, foreign=True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["hydra.output_subdir=.hydra"], "leave it null"),
        (["--experimental-rerun", "x.pickle"], "unpickles a file"),
        (["--config-path", "/tmp"], "replaces conf/"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_option(args: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare("train", args, {})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_user_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs_part.py").write_text(
        "import torch\n\n\ndef solver(denoise, z_t, t, s, *, schedule): ...\n\n\nclass AdamW8bit(torch.optim.AdamW): ...\n"
    )
    (tmp_path / "model/solver").mkdir(parents=True)
    (tmp_path / "model/solver/mine.yaml").write_text("_target_: theirs_part.solver\n_partial_: true\n")
    monkeypatch.syspath_prepend(tmp_path)
    prepare("train", ["model.optimizer._target_=theirs_part.AdamW8bit", "--config-dir", str(tmp_path), "model/solver=mine"], {})
    assert build({"_target_": "theirs_part.AdamW8bit", "_partial_": True}).func.__name__ == "AdamW8bit"
    for theirs in ("transformers.get_cosine_schedule_with_warmup", "transformers.T5EncoderModel", "functools.partial"):
        check_arguments(OmegaConf.create({"part": {"_target_": theirs, "_partial_": True}}), {})


def test_foreign_run_builds_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 0}, run / "checkpoints/last.ckpt")
    trap = {
        "_target_": "lcm.data.fetch.output_of",
        "command": f"touch {tmp_path / 'ran'}",
        "file": str(tmp_path / "out"),
        "timeout": 9,
    }
    for model in ({**trap}, {"_target_": "torch.nn.SiLU", "inner": trap}, {"_target_": "torch.nn.SiLU", "x": "${evil}"}):
        OmegaConf.save({"model": model, "evil": trap, "trainer": {"max_steps": 1}}, run / "config.yaml")
        with pytest.raises(UserError, match=r"lcm\.data\.fetch\.output_of is not allowed"):
            trained(run, "last")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("override", ["data.shards={https://planted@host/?planted", "model.x='https://planted@host/?planted'"])
def test_complaint_holds_no_secret(override: str) -> None:
    with pytest.raises(UserError) as raised:
        prepare("train", [override, "model.nothing=1"], {})
    with pytest.raises(SystemExit) as caught:
        refuse(raised.value)
    assert "planted" not in str(caught.value)
