"""A model from a checkpoint: `python -m lcm.export run=runs/lcd_sd15/0 weights=target dtype=bfloat16 output=model`."""

from typing import Literal

from lcm.app.cli import Program, build
from lcm.core.numbers import Dtype

FORMATS = ("pipeline", "unet")
WEIGHTS = {"trained": "net", "average": "ema_net", "target": "target_net"}  # of a module
program = Program(
    "export",
    run=str,
    checkpoint=str,
    weights=Literal["best", *WEIGHTS],
    dtype=Dtype,
    format=Literal[*FORMATS],
    output=str,
)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from lcm.app.inputs import output_folder
from lcm.core.errors import UserError
from lcm.models.codec import vae_factor
from lcm.models.loading import cast_copy, read_json
from lcm.models.lora import is_adapted, merged
from lcm.models.pipeline import find, load_network
from lcm.modules.latent import LatentModule
from lcm.runtime.atomic_io import whole_file
from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from lcm.runtime.resume import checkpoint_path


def trained(run: Path, checkpoint: str) -> LatentModule:
    """Build the module of a run and load a checkpoint into it.

    checkpoint: "last" or a path. Raises UserError if `run` is not a run folder, has no checkpoint or trained no latent module.
    """
    config_file = run / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run} is not the folder of a run: it has no config.yaml")
    path = checkpoint_path(run, checkpoint)
    if path is None:
        raise UserError(f"{run} has no checkpoint: give one with checkpoint=<path>")
    config: Any = OmegaConf.load(config_file)
    for part, target in (("optimizer", "torch.optim.AdamW"), ("lr_schedule", "lcm.modules.lr_schedules.constant")):
        config.model[part] = {"_target_": target, "_partial_": True}  # unused here, so those of the run need not be installed
    module: Any = build(config.model, foreign=True)
    if not isinstance(module, LatentModule):
        raise UserError(
            f"{run} trained a {type(module).__name__}, which has nothing to export: train.py saved it in {run}/model"
        )
    content = AtomicCheckpointIO().load_checkpoint(path, map_location="cpu", weights_only=True)
    silent: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    module.trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=config.trainer.max_steps, default_root_dir=run, **silent)
    module.trainer.fit_loop.load_state_dict(content["loops"]["fit_loop"])  # sets module.global_step
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    if (resolution := config.data.get("resolution")) is not None:
        vae = read_json(find(module.pipeline) / "vae" / "config.json")
        module.note_sample_size(resolution // vae_factor(vae))
    return module


def choose_net(module: LatentModule, weights: str) -> Any:
    if weights == "best":
        return module.best_net
    net = getattr(module, WEIGHTS[weights], None)
    if net is None:
        raise UserError(f"weights={weights}: this run has no such weights: use weights=best, which train.py saves")
    return net


@program
def main(cfg: DictConfig) -> None:
    """Load a checkpoint, choose its weights and write them."""
    output, dtype = Path(cfg.output), getattr(torch, cfg.dtype)
    module = trained(Path(cfg.run), cfg.checkpoint)
    net = choose_net(module, cfg.weights)
    output_folder(str(output.parent))
    if cfg.format == "pipeline":
        module.save_model(str(output), net, dtype=dtype)
    else:
        output = output.with_suffix(".safetensors")
        net = merged(net, load_network(module.pipeline)) if is_adapted(net) else net
        with whole_file(output) as file:
            state = {name: value.contiguous() for name, value in cast_copy(net, dtype).state_dict().items()}
            file.write(save(state, metadata={"format": "pt"}))
    print(f"model:   {output}   ({cfg.weights} weights of step {module.global_step}, {cfg.dtype})")


if __name__ == "__main__":
    main()
