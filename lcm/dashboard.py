"""A workspace and a report in Weights & Biases for a project's runs: `python -m lcm.dashboard project=latent-consistency`."""

from lcm.app.cli import Program

program = Program("dashboard", project=str, entity=str | None, title=str)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

from typing import Any

from omegaconf import DictConfig

from lcm.core.errors import UserError
from lcm.data.datamodule import IMAGES_SEEN

try:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
except ModuleNotFoundError:
    raise SystemExit("error: the dashboard needs wandb-workspaces: pip install -e '.[dashboard]'") from None

TEXTS = {
    "Quality": "FID (lower is better) and CLIP score (higher is better) by sampling steps, over the images seen. "
    "`callbacks=evaluation` logs them.",
    "Samples": "The same prompts and seeds at each number of sampling steps. Move the slider to go through the training.",
    "Training": "A skipped step had a non-finite loss or gradient.",
    "Speed": "`perf/data_wait` is the share of the time that the training waits for data.",
}


def panels() -> dict[str, list[Any]]:
    """Return the panels by section. The axis of the curves is the number of images seen."""

    def curve(title: str, metric_regex: str, **options: Any) -> Any:
        return reports.LinePlot(title=title, x=IMAGES_SEEN, title_x="images seen", metric_regex=metric_regex, **options)

    return {
        "Quality": [
            curve("FID by sampling steps", r"val/fid_\d+_steps", log_y=True),
            curve("CLIP score by sampling steps", r"val/clip_score_\d+_steps"),
            curve("Other metrics by sampling steps", r"val/(kid|cmmd|precision|recall)_\d+_steps"),
            curve("Validation loss", "val/loss"),
        ],
        "Samples": [
            reports.MediaBrowser(
                title="Samples", media_keys=["val/samples"], mode="gallery", gallery_axis="step", num_columns=1
            ),
            reports.WeavePanelSummaryTable(table_name="val/prompts"),
        ],
        "Training": [
            curve("Loss", "train/loss", log_y=True, smoothing_type="exponentialTimeWeighted", smoothing_factor=0.9),
            curve("Norm of the gradient", "train/grad_norm", log_y=True),
            curve("Learning rate", "lr-.*"),
            curve("Skipped steps", "train/skipped_steps"),
        ],
        "Speed": [
            curve("Images per second", "perf/images_per_sec"),
            curve("Waiting for data", "perf/data_wait", range_y=(0, 1)),
            curve("Model FLOP utilisation", "perf/mfu"),
        ],
    }


def build_workspace(entity: str, project: str, title: str) -> Any:
    """Return a workspace that is not saved yet, with a section for each group of panels."""
    sections = [workspaces.Section(name=name, panels=group, is_open=True) for name, group in panels().items()]
    settings = workspaces.WorkspaceSettings(x_axis=IMAGES_SEEN)
    return workspaces.Workspace(entity=entity, project=project, name=title, sections=sections, settings=settings)


def build_report(entity: str, project: str, title: str) -> Any:
    """Return a report that is not saved yet: a text and the panels of each group, for all runs of the project."""
    blocks: list[Any] = [reports.TableOfContents()]
    for name, group in panels().items():
        runset = reports.Runset(entity=entity, project=project)
        blocks += [reports.H1(name), reports.MarkdownBlock(TEXTS[name]), reports.PanelGrid(runsets=[runset], panels=group)]
    return reports.Report(entity=entity, project=project, title=title, width="fluid", blocks=blocks)


def login() -> str:
    """Return the default entity of the account that is logged in. Raises UserError without an account or an answer."""
    import wandb
    from wandb.errors import Error

    try:
        entity = wandb.Api(timeout=10).default_entity
    except (Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"wandb refuses the login ({reason}): run `wandb login`, or set WANDB_API_KEY") from None
    if entity is None:
        raise UserError("the account of wandb has no default entity: set entity=<team or user>")
    return entity


@program
def main(cfg: DictConfig) -> None:
    """Save the workspace and the report, and print their addresses."""
    default = login()
    names = (cfg.entity or default, cfg.project, cfg.title)
    print(f"workspace: {build_workspace(*names).save().url}")
    report = build_report(*names)
    report.save()
    print(f"report:    {report.url}")


if __name__ == "__main__":
    main()
