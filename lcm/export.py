"""A model from a checkpoint: `python -m lcm.export run=runs/lcd_sd15/0 weights=target dtype=bfloat16 output=model`."""

from typing import Literal

from lcm.app.cli import Program, build
from lcm.core.numbers import Dtype

GRAPHS = ("onnx", "openvino")
FORMATS = ("pipeline", "unet", "kohya", "original", *GRAPHS)
WEIGHTS = {"trained": "net", "average": "ema_net", "target": "target_net"}  # attributes of a module
program = Program(
    "export",
    run=str,
    checkpoint=str,
    weights=Literal["best", *WEIGHTS],
    dtype=Dtype,
    format=Literal[*FORMATS],
    w=float | None,
    card=bool,
    evaluation=str | None,
    push=str | None,
    output=str,
)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save
from torch import Tensor

from lcm.app.hub import Repository
from lcm.app.inputs import output_folder
from lcm.app.model_card import write_card
from lcm.core.errors import UserError
from lcm.core.process import VP
from lcm.models import graphs
from lcm.models.codec import vae_factor
from lcm.models.loading import check_saved, load_part, read_json
from lcm.models.lora import is_adapted, kohya_metadata, kohya_weights, merge_adapters
from lcm.models.pipeline import find, load_network
from lcm.models.saving import FLAT, PREFIX
from lcm.models.single_file import clip_weights, unet_weights, vae_weights
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
        raise UserError(f"{run} is not the folder of a run, it has no config.yaml: give a folder such as runs/lcd_sd15/0")
    path = checkpoint_path(run, checkpoint)
    if path is None:
        raise UserError(f"{run} has no checkpoint: give one with checkpoint=<path>")
    config: Any = OmegaConf.load(config_file)
    for part, target in (("optimizer", "torch.optim.AdamW"), ("lr_schedule", "lcm.modules.lr_schedules.constant")):
        config.model[part] = {"_target_": target, "_partial_": True}  # stand-ins: the run's may not be installed
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
        module.set_sample_size(resolution // vae_factor(vae))
    return module


def choose_net(module: LatentModule, weights: str) -> Any:
    """Return the network that holds these weights. Raises UserError for weights that the run does not have."""
    if weights == "best":
        return module.best_net
    net = getattr(module, WEIGHTS[weights], None)
    if net is None:
        raise UserError(f"weights={weights}: this run has no such weights: use weights=best, which train.py saves")
    return net


def check_format(cfg: DictConfig, module: LatentModule, net: Any) -> None:
    """Raise UserError for a format that the network does not have, and for an option without effect."""
    if cfg.card and cfg.format != "pipeline":
        raise UserError(f"card=true has no effect on format={cfg.format}: a card is part of format=pipeline")
    if cfg.evaluation is not None and not cfg.card:
        raise UserError(f"evaluation={cfg.evaluation} has no effect without a card: set card=true")
    if cfg.evaluation is not None and not Path(cfg.evaluation, "table.md").is_file():
        raise UserError(f"evaluation={cfg.evaluation} has no table.md: give the output folder of lcm.evaluate")
    if cfg.format in GRAPHS:
        graphs.check(module.family, cfg.format, f"format={cfg.format}")
        if module.extra_networks():
            raise UserError(f"format={cfg.format} holds one network, and this run trained several: use format=pipeline")
    if cfg.format in ("kohya", "original") and module.family.original(net) is None:
        raise UserError(
            f"format={cfg.format}: other programs have no names for {module.family.pipelines[0]}: use format=pipeline"
        )
    if cfg.format == "kohya" and not is_adapted(net):
        raise UserError("format=kohya is for adapters (LoRA), and this run trained the whole network: use format=original")
    if cfg.format != "original":
        if cfg.w is not None:
            raise UserError(f"w={cfg.w:g} has no effect on format={cfg.format}: leave w out, or use format=original")
        return
    if module.family.takes_w(net) and cfg.w is None:
        raise UserError(
            "format=original has no input for w, and this network takes w: fix it by w=7, for example, or use format=pipeline"
        )
    if cfg.w is not None and not module.family.takes_w(net):
        raise UserError(f"w={cfg.w:g} has no effect: this network does not take w: leave w out")
    if cfg.w is not None and not math.isfinite(cfg.w):
        raise UserError(f"w={cfg.w:g} is not a finite number: set w=7, for example")
    process = module.process.config
    if not isinstance(module.process, VP) or process != {
        **VP().config,
        "rescale_betas_zero_snr": process["rescale_betas_zero_snr"],
    }:
        raise UserError("format=original: other programs assume the noise schedule of Stable Diffusion: use format=pipeline")


def single_file_weights(module: LatentModule, net: Any, w: float | None) -> dict[str, Tensor]:
    """Return the network, at this w, with its VAE and text encoders in the original layout."""
    base, original = find(module.pipeline), module.family.original(net)
    assert original is not None
    net = merge_adapters(net, load_network(module.pipeline)) if is_adapted(net) else net
    weights = unet_weights(net if w is None else module.family.at_w(net, w))
    weights |= vae_weights(load_part(AutoencoderKL, base / "vae", torch_dtype=torch.float32))
    for tower, prefix in zip(module.family.towers, original.text, strict=True):
        encoder = load_part(tower.encoder_class, base / tower.encoder, dtype=torch.float32).state_dict()
        weights |= clip_weights({PREFIX * name.startswith(FLAT) + name: value for name, value in encoder.items()}, prefix)
    return weights


def write(file: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write weights in this dtype to a .safetensors file. Raises UserError for weights that are not finite in it."""
    cast = {name: value.detach().to(dtype).contiguous() for name, value in weights.items()}
    check_saved(cast, weights)
    with whole_file(file) as opened:
        opened.write(save(cast, metadata={"format": "pt", **metadata}))


@program
def main(cfg: DictConfig) -> None:
    """Load a checkpoint, choose its weights and write them."""
    output, dtype = Path(cfg.output), getattr(torch, cfg.dtype)
    repository = None if cfg.push is None else Repository(cfg.push)
    module = trained(Path(cfg.run), cfg.checkpoint)
    net = choose_net(module, cfg.weights)
    check_format(cfg, module, net)
    output_folder(str(output.parent))
    output = output if cfg.format in ("pipeline", *GRAPHS) else output.with_suffix(".safetensors")
    original = module.family.original(net)
    match cfg.format:
        case "pipeline":
            module.save_model(str(output), net, dtype=dtype)
            if cfg.card:
                write_card(output, Path(cfg.run), None if cfg.evaluation is None else Path(cfg.evaluation))
        case "onnx" | "openvino":
            with TemporaryDirectory(dir=output.parent) as folder:
                module.save_model(f"{folder}/model", net, dtype=dtype)
                graphs.write_graphs(Path(folder, "model"), output, cfg.format)
        case "unet":
            net = merge_adapters(net, load_network(module.pipeline)) if is_adapted(net) else net
            write(output, net.state_dict(), dtype, {})
        case "kohya":
            assert original is not None
            write(output, kohya_weights(net), dtype, kohya_metadata(net, original))
        case _:
            assert original is not None
            spec = {"sai_model_spec": "1.0.0", "architecture": original.architecture, "prediction_type": module.prediction_type}
            metadata = {f"modelspec.{name}": value for name, value in spec.items()}
            write(output, single_file_weights(module, net, cfg.w), dtype, metadata)
    fixed = "" if cfg.w is None else f", w = {cfg.w:g}"
    print(f"model:   {output}   ({cfg.weights} weights of step {module.global_step}, {cfg.dtype}{fixed})")
    if repository is not None:
        print(f"hub:     {repository.upload(output)}")


if __name__ == "__main__":
    main()
