"""The dashboard's workspace and report build without an internet connection. The sweep files hold commands of train.py."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lcm.core.errors import UserError
from lcm.dashboard import TEXTS, build_report, build_workspace, login, panels
from tests.conf.programs import configured

SWEEPS = sorted((Path(__file__).parents[2] / "docs/sweeps").glob("*.yaml"))
LOGGED = ["val/fid_1_steps", "val/fid_4_steps", "val/clip_score_8_steps", "val/loss", "train/loss", "perf/images_per_sec"]


def test_workspace_has_one_chart_for_all_step_counts() -> None:
    model = build_workspace("team", "project", "LCM")._to_model().model_dump(by_alias=True, exclude_none=True)
    assert (model["entity"], model["project"], model["displayName"]) == ("team", "project", "LCM")
    sections = model["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections if section["panels"]] == list(panels()) == list(TEXTS)
    configs = [panel["config"] for section in sections for panel in section["panels"]]
    curves = [config for config in configs if "metricRegex" in config]
    assert {config["xAxis"] for config in curves} == {"trainer/images_seen"}
    shown = [[name for name in LOGGED if re.fullmatch(config["metricRegex"], name)] for config in curves]
    assert [names for names in shown if names] == [LOGGED[:2], [LOGGED[2]], [LOGGED[3]], [LOGGED[4]], [LOGGED[5]]]
    assert [config["mediaKeys"] for config in configs if "mediaKeys" in config] == [["val/samples"]]
    assert "val/prompts" in str(configs)


def test_report_explains_each_group() -> None:
    report = build_report("team", "project", "LCM")
    grids = [block for block in report.blocks if hasattr(block, "panels")]
    assert [len(grid.panels) for grid in grids] == [len(group) for group in panels().values()]
    assert {(runset.entity, runset.project) for grid in grids for runset in grid.runsets} == {("team", "project")}
    assert [block.text for block in report.blocks if hasattr(block, "text") and block.text in TEXTS.values()] == [
        *TEXTS.values()
    ]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_agent_of_a_sweep_starts_trainings(file: Path) -> None:
    """wandb's code builds a command line from the extreme values of each parameter. train.py accepts this command line."""
    sweep: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    options = [
        [choices[key] for key in ("min", "max")] if "min" in choices else [choices["values"][0], choices["values"][-1]]
        for choices in sweep["parameters"].values()
    ]
    for values in zip(*options, strict=True):
        args = {name: {"value": value} for name, value in zip(sweep["parameters"], values, strict=True)}
        overrides = create_sweep_command_args({"args": args})["args_no_hyphens"]
        command = [part for part in create_sweep_command(sweep["command"]) if not part.startswith("${")]
        assert command[0] == "python"
        assert sweep["program"] == "train.py"
        cfg = configured("train", [*command[1:], *overrides])
        assert set(cfg.logger) == {"csv", "wandb"}
        assert sweep["metric"]["name"] in {
            f"val/{name}_{n}_steps" for name in cfg.callbacks.evaluation.metrics for n in cfg.callbacks.evaluation.steps
        }


def test_without_a_login_one_sentence_tells_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^wandb refuses the login \(.*\): run `wandb login`, or set WANDB_API_KEY$"):
        login()
