"""Graphs of a pipeline's networks: folders in ONNX or OpenVINO that optimum opens, and networks that OpenVINO runs.

Folders, files, inputs and outputs have the names of optimum's exporters.
"""

import functools
import importlib.util
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import safe_open
from torch import Tensor, nn

from lcm.core.errors import UserError
from lcm.models.codec import LatentCodec
from lcm.models.families import Family, tokens
from lcm.models.loading import weight_files
from lcm.models.pipeline import load_codec, load_network
from lcm.runtime.atomic_io import digest, whole_folder

BATCH = {0: "batch_size"}
SEQUENCE = {**BATCH, 1: "length"}
PICTURE = {**BATCH, 2: "height", 3: "width"}
FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}


class Part(NamedTuple):
    """A network to trace.

    inputs: examples of two samples, by name. axes: the dynamic axes of the inputs, by name. outputs: those of the outputs.
    """

    network: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: dict[str, dict[int, str]]


class Positional(nn.Module):
    """A network that takes tensors by position and returns a tuple, as a tracer needs it."""

    def __init__(self, network: nn.Module, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.function(*inputs)


def check(family: Family, form: str, option: str) -> None:
    """Raise UserError unless the package is installed and converts the networks of this family. form: the package's name."""
    if family.network != "unet":
        raise UserError(f"{option} is for Stable Diffusion 1, 2 and XL, and this is a {family.pipelines[0]}: leave it out")
    if importlib.util.find_spec(form) is None:
        raise UserError(f"{option} needs the package {form}: run pip install -e '.[openvino]'")


def unet(net: Any, codec: LatentCodec) -> Part:
    """Return the UNet as a part. The input for w and the inputs of Stable Diffusion XL are included if the UNet has them."""
    side, channels, w_dim = net.config["sample_size"] or 64, net.config["in_channels"], net.config["time_cond_proj_dim"]
    z = torch.randn(2, channels, *((side, side) if isinstance(side, int) else side))
    cond, _ = codec.conditions(["", "a"], z)
    inputs = {"sample": z, "timestep": torch.tensor(499.0), "encoder_hidden_states": cond["states"]}
    axes = {"sample": PICTURE, "encoder_hidden_states": SEQUENCE}
    if w_dim is not None:
        inputs["timestep_cond"] = torch.randn(2, w_dim)
    if "pooled" in cond:
        inputs |= {"text_embeds": cond["pooled"], "time_ids": cond["sizes"].float()}

    def call(z: Tensor, time: Tensor, states: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(list(inputs)[3:], more, strict=True))
        w = {"timestep_cond": named.pop("timestep_cond", None)}
        return net(z, time, states, **w, added_cond_kwargs=named or None, return_dict=False)

    axes |= {name: BATCH for name in list(inputs)[3:]}
    return Part(Positional(net, call), inputs, axes, {"out_sample": PICTURE})


def vae_decoder(vae: AutoencoderKL) -> Part:
    side = 64 // 2 ** (len(vae.config["block_out_channels"]) - 1)
    z = torch.randn(2, vae.config["latent_channels"], side, side)
    decoder = Positional(vae, lambda z: vae.decode(z, return_dict=False))
    return Part(decoder, {"latent_sample": z}, {"latent_sample": PICTURE}, {"sample": PICTURE})


def vae_encoder(vae: AutoencoderKL) -> Part:
    encoder = Positional(vae, lambda x: (vae.encode(x).latent_dist.parameters,))
    return Part(encoder, {"sample": torch.randn(2, 3, 64, 64)}, {"sample": PICTURE}, {"latent_parameters": PICTURE})


def text_encoder(encoder: Any, tokenizer: Any) -> Part:
    """Return a text encoder of CLIP with all hidden states, which Stable Diffusion XL and clip_skip need."""
    projected = type(encoder).__name__.endswith("WithProjection")
    pooled, last = {"text_embeds" if projected else "pooler_output": BATCH}, {"last_hidden_state": SEQUENCE}
    first = pooled | last if projected else last | pooled

    def call(ids: Tensor) -> tuple[Tensor, ...]:
        output = encoder(ids, output_hidden_states=True)
        return (*(output[name] for name in first), *output.hidden_states)

    outputs = first | {f"hidden_states.{i}": SEQUENCE for i in range(encoder.config.num_hidden_layers + 1)}
    ids = tokens(tokenizer, ["", "a"], encoder.device)["input_ids"]
    return Part(Positional(encoder, call), {"input_ids": ids}, {"input_ids": SEQUENCE}, outputs)


def to_openvino(part: Part) -> Any:
    """Return the network as an `openvino.Model` with dynamic batch and image sizes."""
    import openvino

    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        model = openvino.convert_model(part.network.eval(), example_input=tuple(part.inputs.values()))
    for node, (name, example) in zip(model.inputs, part.inputs.items(), strict=True):
        node.get_tensor().set_names({name})
        dynamic = part.axes.get(name, {})
        shape = [-1 if axis in dynamic else size for axis, size in enumerate(example.shape)]
        node.get_node().set_partial_shape(openvino.PartialShape(shape))
    for output, name in zip(model.outputs, part.outputs, strict=True):
        output.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    return model


def write_onnx(part: Part, file: Path) -> None:
    """Write a network as ONNX, with the weights in a second file: a protobuf file holds at most 2 GB."""
    import onnx

    with TemporaryDirectory(dir=file.parent) as folder, torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            part.network.eval(),
            tuple(part.inputs.values()),
            f"{folder}/model.onnx",
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_axes=part.axes | {name: {i: f"{name}_{i}" for i in axes} for name, axes in part.outputs.items()},
            opset_version=17,
            dynamo=False,  # the newer exporter takes minutes and fixes the number of tokens
        )
        model = onnx.load(f"{folder}/model.onnx")
    onnx.save_model(model, file, save_as_external_data=True, location=f"{file.name}_data")


def write_graphs(pipeline: Path, target: Path, form: str) -> None:
    """Write the networks of a pipeline folder as graphs, into the folder `target`.

    form: "onnx" (float32) or "openvino", which keeps weights that are stored in float16. The folder is written under another
    name and renamed.
    """
    codec, net = load_codec(pipeline), load_network(pipeline)
    family, vae = codec.text.family, codec.vae.to(memory_format=torch.contiguous_format)
    parts: dict[str, tuple[str, Callable[[], Part]]] = {
        "unet": ("unet", lambda: unet(net, codec)),
        "vae_encoder": ("vae", lambda: vae_encoder(vae)),
        "vae_decoder": ("vae", lambda: vae_decoder(vae)),
    }
    for tower, encoder, tokenizer in zip(family.towers, codec.text.encoders, codec.text.tokenizers, strict=True):
        parts[tower.encoder] = (tower.encoder, functools.partial(text_encoder, encoder, tokenizer))
    with whole_folder(target) as partial:
        for name, (source, make) in parts.items():
            print(f"{form}:{' ' * (8 - len(form))} {name}", flush=True)
            (partial / name).mkdir()
            shutil.copyfile(pipeline / source / "config.json", partial / name / "config.json")
            if form == "onnx":
                write_onnx(make(), partial / name / FILES[form])
            else:
                import openvino

                with safe_open(weight_files(pipeline / source)[1][0], "pt") as file:
                    half = file.get_slice(next(iter(file.keys()))).get_dtype() == "F16"
                openvino.save_model(to_openvino(make()), partial / name / FILES[form], compress_to_fp16=half)
        for name in ("scheduler", *(tower.tokenizer for tower in family.towers)):
            shutil.copytree(pipeline / name, partial / name)
        for name in ("model_index.json", "lcm.json"):
            shutil.copyfile(pipeline / name, partial / name)


@functools.cache
def openvino_core() -> Any:
    """Return the `openvino.Core` of this process, which is never deleted.

    A core gives the main thread an alternate signal stack, and frees the stack when the core is deleted. After several cores
    the thread can have a freed stack. The next signal, such as the SIGCHLD of a loader worker, then crashes the process.
    """
    import openvino

    return openvino.Core()


class Graph:
    """A network that OpenVINO runs on the CPU, to take the place of a `forward` or of a VAE's `decode`.

    key: plain data that identifies the weights and their use; names the folder of the conversion in the hub's cache. dtype: the
    dtype of the computation, float32 or bfloat16.
    """

    def __init__(self, part: Part, key: Any, dtype: torch.dtype) -> None:
        import openvino

        folder = Path(HF_HOME) / "openvino" / digest([key, openvino.__version__])
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                print(f"openvino: converting to {folder}, once", flush=True)
                with whole_folder(folder) as partial:
                    openvino.save_model(to_openvino(part), partial / FILES["openvino"], compress_to_fp16=False)
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.names = list(part.inputs)
        self.compiled = openvino_core().compile_model(folder / FILES["openvino"], "CPU", options)

    def __call__(self, *inputs: Tensor, return_dict: bool = True, added_cond_kwargs: Any = None, **named: Any) -> Any:
        """Return the output as diffusers' network does. It takes the same inputs, with one timestep for all samples."""
        tensors = {**dict(zip(self.names, inputs, strict=False)), **named, **(added_cond_kwargs or {})}
        if "timestep" in tensors:
            tensors["timestep"] = tensors["timestep"].flatten()[0]
        arrays = [tensors[name].to("cpu", dtype=torch.float32).contiguous().numpy() for name in self.names]
        output = torch.from_numpy(self.compiled(arrays)[0])
        return SimpleNamespace(sample=output) if return_dict else (output,)
