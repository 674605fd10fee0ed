"""From the command line to a program's objects: composing, building, and what a user sees when either fails."""

import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from lcm import precision  # noqa: F401  its resolvers
from lcm.errors import UserError
from lcm.limits import check_limits
from lcm.redaction import hide_in_logs, redacted
from lcm.targets import CONF, check_targets

failures: list[int] = []  # the numbers of a sweep's jobs that ended in an error


def program(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `main(cfg)` a Hydra program whose wrong input ends in one sentence and exit code 1."""

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def checked(cfg: DictConfig) -> Any:
            quiet()
            try:
                check_missing(cfg)
                return main(cfg)
            except UserError as error:
                return fail(error)
            except MisconfigurationException as error:  # Lightning's own sentences
                return fail(" ".join(str(error).split()))
            except torch.OutOfMemoryError:
                return fail(
                    "the GPU's memory is full: lower data.batch_size, if need be with trainer.accumulate_grad_batches, or see "
                    "docs/larger-models.md"
                )
            except UnpicklingError:
                return fail(
                    "a file to be loaded holds code, not tensors alone, and is refused: give one that this program wrote"
                )

        def run() -> None:
            hide_in_logs()  # Hydra's launchers log a sweep's overrides
            warnings.filterwarnings("ignore", r"\s*'hydra/launcher/.* ConfigStore")  # conf/ fills in a plugin's own schema
            check_overrides(config_name, sys.argv[1:])
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(checked)()
            if failures:
                sys.exit(1)

        return run

    return decorate


def refuse(reason: object) -> NoReturn:
    sys.exit(f"error: {redacted(str(reason))}")


def fail(reason: object) -> None:
    """End, but for a sweep in this process: it goes on with its other jobs, and ends with exit code 1."""
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode is not RunMode.MULTIRUN or not hydra_cfg.launcher["_target_"].endswith(".BasicLauncher"):
        refuse(reason)
    print(f"error: {redacted(str(reason))}", file=sys.stderr, flush=True)
    failures.append(hydra_cfg.job.num)


def check_missing(cfg: DictConfig) -> None:
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
    except InterpolationToMissingValueError as error:  # another key takes its value from it
        missing = re.findall(r"Missing mandatory value: ([\w.]+)", str(error))
    if missing:
        raise UserError(f"{missing[0]} has no default: give it on the command line, {missing[0]}=...")


def quiet() -> None:
    """Keep the libraries' advertisements and per-file bars off the screen."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        "Checkpoint directory",
        "Found .* eval mode",
        "isinstance.treespec",
        "The '.*' does not have many workers",
        "The `srun` command is available",  # it goes on with the command line, secrets included
        "torch.distributed is disabled",
        "This DataLoader will create",
        "Total length of `list` across ranks is zero",
        "torch.distributed.nn.functional.all_gather is deprecated",
    ):
        warnings.filterwarnings("ignore", f".*{message}")


def compose(config_name: str, overrides: list[str], **options: Any) -> DictConfig:
    """options: `return_hydra_config=True` keeps what Hydra itself is configured with."""
    if GlobalHydra.instance().is_initialized():  # within a program, whose search path is this one
        return hydra.compose(config_name, overrides, **options)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(config_name, overrides, **options)


def check_overrides(config_name: str, args: list[str]) -> None:
    """Exit with one sentence, naming the nearest valid key, where Hydra would print a page or build what is not allowed."""
    options = get_args_parser().parse_args(args)
    if options.experimental_rerun or options.config_path:
        refuse("--experimental-rerun unpickles a file and --config-path replaces conf/: give overrides, or --config-dir")
    name, overrides = options.config_name or config_name, options.overrides
    if options.config_dir:
        if any(override.lstrip("+").startswith("hydra.searchpath=") for override in overrides):
            refuse("--config-dir and hydra.searchpath say the same: give all folders with hydra.searchpath=[...]")
        overrides = [f"hydra.searchpath=['file://{os.path.abspath(options.config_dir)}']", *overrides]
    try:
        for single in single_runs(overrides):
            cfg = compose(name, single, return_hydra_config=True)
            check_composed(cfg)
            swept = [f"{key}={values}" for key, values in (cfg.hydra.sweeper.get("params") or {}).items()]
            if swept and (options.multirun or cfg.hydra.mode is RunMode.MULTIRUN):
                for run in single_runs([*swept, *single]):
                    check_composed(compose(name, run, return_hydra_config=True))
    except UserError as error:
        refuse(error)
    except (HydraException, OmegaConfBaseException) as error:
        if not (options.help or options.hydra_help or options.cfg or options.info or options.shell_completion):
            refuse(explain(name, str(error)))  # those are Hydra's to answer


def check_composed(cfg: DictConfig) -> None:
    """Raises UserError for a number that cannot be meant and for a `_target_` that is not allowed, also where Hydra builds it
    before the program starts."""
    if cfg.hydra.output_subdir is not None:
        raise UserError("hydra.output_subdir would hold secrets of the overrides: leave it null, config.yaml says what was run")
    found = plain(cfg)
    for part in ("job_logging", "hydra_logging"):
        check_targets(found["hydra"].pop(part), f"hydra.{part}", logs=True)
    check_targets(found)
    check_limits({name: part for name, part in found.items() if name != "hydra"})


def plain(node: Any) -> Any:
    """Containers without interpolations; what cannot be resolved yet, such as the run's folder, is None."""
    if OmegaConf.is_config(node):
        keys = list(node) if OmegaConf.is_dict(node) else range(len(node))
        found = {}
        for key in keys:
            try:
                found[key] = plain(node[key])
            except OmegaConfBaseException:
                found[key] = None
        return found if OmegaConf.is_dict(node) else list(found.values())
    return node


def single_runs(overrides: list[str]) -> Iterator[list[str]]:
    """Without sweeps the overrides themselves; else one list for each alternative of each sweep, the others at their first."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [text]
        for text, override in zip(overrides, parsed, strict=True)
    ]
    first = [alternatives[0] for alternatives in choices]
    yield first
    for i, alternatives in enumerate(choices):
        for alternative in alternatives[1:]:
            yield [*first[:i], alternative, *first[i + 1 :]]


def explain(config_name: str, message: str) -> str:
    """One sentence out of a composition error of Hydra's."""
    if match := re.search(
        r"Could not find '([^']+)'(?:.*?Available options in '([^']+)':\s*(.*?)\s*Config search path)?", message, re.S
    ):
        wanted, group, options = match.groups()
        choices = [option for option in (options or "").split() if not option.startswith("_")]  # those are parts of others
        return f"there is no config '{wanted}'" + (f"; {group} has: {', '.join(choices)}" if choices else "")
    if match := re.search(r"Could not override '([^']+)'", message):
        key = match[1]
        groups = ["/".join(path.relative_to(CONF).parts) for path in CONF.rglob("*") if path.is_dir()]
        known = groups + dotted_keys(compose(config_name, []))
        if key in known:
            return f"{key} is a group of configs: choose one, {key}=<name>, or set a key in it, such as +{key}.name=..."
        near = difflib.get_close_matches(key, known, n=1)
        return f"there is no config key '{key}'" + (f", did you mean '{near[0]}'?" if near else "")
    if re.search(r"mismatched input|no viable alternative|extraneous input|token recognition", message):
        first = message.splitlines()[0]
        return f"an override cannot be parsed ({first}); quote special characters twice, as in \"key='a{{0..9}}.tar'\""
    return " ".join(message.split())


def dotted_keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return []
    keys = []
    for key in map(str, node):
        keys += [f"{prefix}{key}", *dotted_keys(node._get_node(key), f"{prefix}{key}.")]
    return keys


def build(node: Any) -> Any:
    """`instantiate` of what is allowed, with plain containers; None of nothing. A constructor's complaint is a UserError."""
    if not node:
        return None
    node = node if OmegaConf.is_config(node) else OmegaConf.create(node, flags={"allow_objects": True})
    check_targets(plain(node))
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        where = error.args[0].partition("full_key: ")[2] or "the configuration"
        raise UserError(f"cannot build {where}: {type(cause).__name__}: {' '.join(str(cause).split())}") from cause


def build_all(nodes: Any) -> list[Any]:
    """What a group of named parts describes; numbers that an experiment sets for a part not chosen (callbacks=default) describe
    nothing."""
    return [build(node) for node in (nodes or {}).values() if node and "_target_" in node]


def read_prompts(prompts: str | list[str], captions: Callable[[], list[str]]) -> list[str]:
    """A prompt, a list of them, a .txt file with one a line, or `val`: the validation captions."""
    if prompts == "val":
        return captions()
    if isinstance(prompts, str) and prompts.endswith(".txt"):
        file = Path(prompts)
        try:
            prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            raise UserError(f"there is no prompt file {prompts}") from None
        except (OSError, UnicodeError) as error:
            raise UserError(f"the prompt file {file} cannot be read ({error}): write one prompt a line, in UTF-8") from error
        if not prompts:
            raise UserError(f"{file} has no prompts: write one a line")
    if not prompts:
        raise UserError(f"prompts={prompts} has none: give one, a list, or a .txt file; prompts=[''] draws without a text")
    return [prompts] if isinstance(prompts, str) else [str(prompt) for prompt in prompts]


def output_folder(path: str, option: str = "output") -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)  # another process of the same program may have been first
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): set {option} to a writable folder") from None
    return folder


def pick_device(device: str, local_rank: int = 0) -> str:
    """`auto` is the GPU if there is one; of several processes on a machine each has its own as `cuda`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU: use device=cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device} is none: use auto, cuda, cuda:1, cpu or mps") from None
    if device == "cuda":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return device
