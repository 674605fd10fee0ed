"""A model from a checkpoint: `python -m lcm.export run=runs/lcd_sd15/0 weights=target dtype=bfloat16 output=model`."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from lcm.app.cli import build, program
from lcm.app.inputs import output_folder
from lcm.core.errors import UserError
from lcm.core.numbers import Dtype
from lcm.models.codec import vae_factor
from lcm.models.loading import cast_copy, read_json
from lcm.models.lora import is_adapted, merged
from lcm.models.pipeline import find, load_network
from lcm.modules.latent import LatentModule
from lcm.runtime.atomic_io import whole_file
from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from lcm.runtime.resume import checkpoint_path

FORMATS = ("pipeline", "unet")
WEIGHTS = {"trained": "net", "average": "ema_net", "target": "target_net"}  # of a module


def trained(run: Path, checkpoint: str) -> LatentModule:
    """The module of a run as it was when the checkpoint was written."""
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run} is not the folder of a run: it has no config.yaml")
    found = checkpoint_path(run, checkpoint)
    if found is None:
        raise UserError(f"{run} has no checkpoint: give one with checkpoint=<path>")
    config: Any = OmegaConf.load(file)
    for part, target in (("optimizer", "torch.optim.AdamW"), ("lr_schedule", "lcm.modules.lr_schedules.constant")):
        config.model[part] = {"_target_": target, "_partial_": True}  # nothing is trained, whatever the run's was
    module: Any = build(config.model, foreign=True)
    if not isinstance(module, LatentModule):
        raise UserError(
            f"{run} trained a {type(module).__name__}, which has nothing to export: train.py saved it in {run}/model"
        )
    content = AtomicCheckpointIO().load_checkpoint(found, map_location="cpu", weights_only=True)
    silent: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    steps = config.trainer.max_steps
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=steps, default_root_dir=run, **silent)
    trainer.fit_loop.load_state_dict(content["loops"]["fit_loop"])  # so that the module knows its step
    module.trainer = trainer
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    if (resolution := config.data.get("resolution")) is not None:
        vae = read_json(find(module.pipeline) / "vae" / "config.json")
        module.note_sample_size(resolution // vae_factor(vae))
    return module


def chosen(module: LatentModule, weights: str) -> Any:
    if weights == "best":
        return module.best_net
    net = getattr(module, WEIGHTS[weights], None)
    if net is None:
        raise UserError(f"weights={weights}: this run kept no such weights; weights=best are those that train.py saves")
    return net


@program(
    "export",
    run=str,
    checkpoint=str,
    weights=Literal["best", *WEIGHTS],
    dtype=Dtype,
    format=Literal[*FORMATS],
    output=str,
)
def main(cfg: DictConfig) -> None:
    """Read, choose, write."""
    run, output, dtype = Path(cfg.run), Path(cfg.output), getattr(torch, cfg.dtype)
    module = trained(run, cfg.checkpoint)
    net = chosen(module, cfg.weights)
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
