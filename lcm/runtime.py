"""Between the command line and the program: composing with good errors, building objects, run directories, resuming."""

import difflib
import itertools
import json
import logging
import os
import re
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lcm.errors import UserError

LAST = "checkpoints/last.ckpt"
CONF = Path(__file__).parent.parent / "conf"


def program(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `main(cfg)` a Hydra program whose wrong input ends in one sentence and exit code 1."""

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def checked(cfg: DictConfig) -> Any:
            quiet()
            if missing := sorted(OmegaConf.missing_keys(cfg)):
                sys.exit(f"error: {missing[0]} has no default: give it on the command line, {missing[0]}=...")
            try:
                return main(cfg)
            except UserError as error:
                sys.exit(f"error: {error}")

        def run() -> None:
            check_overrides(config_name, sys.argv[1:])
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(checked)()

        return run

    return decorate


def quiet() -> None:
    """Keep the libraries' advertisements and per-file bars off the screen."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in ("Checkpoint directory", "Found .* eval mode", "isinstance.treespec", "The '.*' does not have many workers"):
        warnings.filterwarnings("ignore", f".*{message}")


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(config_name, overrides)


def check_overrides(config_name: str, args: list[str]) -> None:
    """Exit with one sentence, naming the nearest valid key, where Hydra would print a page."""
    overrides = [arg for arg in args if arg not in ("-m", "--multirun")]
    if any(arg.startswith("-") for arg in overrides):
        return  # --help, --cfg job and other options are Hydra's to answer
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        if not any(override.is_sweep_override() for override in parsed):
            compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(config_name, str(error))}")


def explain(config_name: str, message: str) -> str:
    """One sentence out of a composition error of Hydra's."""
    if match := re.search(
        r"Could not find '([^']+)'(?:.*?Available options in '([^']+)':\s*(.*?)\s*Config search path)?", message, re.S
    ):
        wanted, group, options = match.groups()
        choices = (options or "").split()
        return f"there is no config '{wanted}'" + (f"; {group} has: {', '.join(choices)}" if choices else "")
    if match := re.search(r"Could not override '([^']+)'", message):
        key = match[1]
        groups = ["/".join(path.relative_to(CONF).parts) for path in CONF.rglob("*") if path.is_dir()]
        known = groups + dotted_keys(compose(config_name, []))
        near = difflib.get_close_matches(key, known, n=1)
        return f"there is no config key '{key}'" + (f", did you mean '{near[0]}'?" if near else "")
    return " ".join(message.split())


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return []
    keys = []
    for key in map(str, node):
        keys += [f"{prefix}{key}", *dotted_keys(node._get_node(key), f"{prefix}{key}.")]
    return keys


def build(node: Any) -> Any:
    """`instantiate` with plain containers; a constructor's complaint becomes a UserError."""
    try:
        return instantiate(node, _convert_="all") if node else {}
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        where = error.args[0].partition("full_key: ")[2] or "the configuration"
        raise UserError(f"cannot build {where}: {type(cause).__name__}: {' '.join(str(cause).split())}") from cause


def start_run(cfg: DictConfig) -> Path:
    """The run's directory, the same for all ranks and restarts: `<runs>/<name>/<id>`.

    The id is the SLURM job's, or the next free number; `ckpt_path=last` goes on in the newest run that has a checkpoint.
    """
    parent = Path(cfg.paths.runs) / cfg.name
    run_id = cfg.paths.run_id
    if run_id is None and "LOCAL_RANK" in os.environ:
        run_id = os.environ.get("LCM_RUN_ID")  # this process was launched by the one that chose
    if run_id is None and cfg.ckpt_path == "last":
        run_id = next((n for n in reversed(run_numbers(parent)) if (parent / str(n) / LAST).is_file()), None)
    try:
        run_dir = parent / str(run_id) if run_id is not None else next_run(parent)
        run_dir.mkdir(parents=True, exist_ok=True)
        identity = run_dir / "run.json"
        if not identity.is_file():
            identity.write_text(json.dumps({"id": uuid.uuid4().hex[:8]}))
    except OSError as error:
        raise UserError(
            f"cannot write the run directory under {parent} ({error.strerror}): set paths.runs to a writable folder"
        ) from None
    os.environ["LCM_RUN_ID"] = run_dir.name
    with open_dict(cfg):
        cfg.paths.run_dir, cfg.paths.wandb_id = str(run_dir), json.loads(identity.read_text())["id"]
    print(f"run:     {run_dir}", flush=True)
    return run_dir


def run_numbers(parent: Path) -> list[int]:
    return sorted(int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit())


def next_run(parent: Path) -> Path:
    """Make the first free number's folder; two programs that start at once get two."""
    numbers = run_numbers(parent)
    for number in itertools.count(numbers[-1] + 1 if numbers else 0):
        try:
            (parent / str(number)).mkdir(parents=True)
            return parent / str(number)
        except FileExistsError:
            continue
    raise AssertionError("itertools.count ends")


def resume_path(cfg: DictConfig) -> str | None:
    """The checkpoint to go on from: a path, or the newest one of this run for `last` (a fresh start if there is none yet)."""
    if cfg.ckpt_path is None:
        return None
    if "://" in str(cfg.ckpt_path):
        raise UserError("ckpt_path must be a local file: copy the checkpoint here first")
    path = Path(cfg.paths.run_dir, LAST) if cfg.ckpt_path == "last" else Path(cfg.ckpt_path)
    if path.is_file():
        return str(path)
    if cfg.ckpt_path == "last":
        return None
    raise UserError(f"ckpt_path={cfg.ckpt_path} is not a file; ckpt_path=last goes on with the newest run of this name")


def write_config(cfg: DictConfig, trainer: Any) -> None:
    """Keep the run's configuration beside its results and in its loggers."""
    if trainer.is_global_zero:
        OmegaConf.save(cfg, Path(cfg.paths.run_dir, "config.yaml"))
        for logger in trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))


def find_pipeline(pipeline: str, runs: str) -> str:
    """A pipeline folder, hub id or "mini" as given; for "last" the newest model that a run under `runs` saved."""
    if pipeline != "last":
        return pipeline
    saved = sorted(Path(runs).glob("*/*/model/model_index.json"), key=lambda file: file.stat().st_mtime)
    if not saved:
        raise UserError(
            f"no run under {runs}/ has saved a model yet: run `python train.py`, or set pipeline=<folder or hub id>"
        )
    return str(saved[-1].parent)


def read_prompts(prompts: str | list[str], captions: Callable[[], list[str]]) -> list[str]:
    """A prompt, a list of them, a .txt file with one a line, or `val`: the validation captions."""
    if prompts == "val":
        return captions()
    if isinstance(prompts, str) and prompts.endswith(".txt"):
        file = Path(prompts)
        if not file.is_file():
            raise UserError(f"there is no prompt file {prompts}")
        prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        if not prompts:
            raise UserError(f"{file} has no prompts: write one a line")
    return [prompts] if isinstance(prompts, str) else list(prompts)


def output_folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): set output to a writable folder") from None
    return folder


def pick_device(device: str) -> str:
    """`auto` is the GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU: use device=cpu")
    return device
