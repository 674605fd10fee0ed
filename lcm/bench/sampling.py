"""Few-step sampling beside LatentConsistencyModelPipeline of diffusers, with the same weights and the same noise."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import LatentConsistencyModelPipeline
from torch import Tensor

from lcm.app.inputs import pick_device
from lcm.bench.measure import Table, in_turn, now
from lcm.core.numbers import Engine
from lcm.core.random import ImageNoise
from lcm.models.pipeline import find, load_family, load_network, load_prediction_type, load_process
from lcm.models.saving import save_pipeline
from lcm.models.text_to_image import TextToImage

Sampler = Callable[[list[str], int, float], Tensor]  # (prompts, steps, w) -> images [B, 3, H, W] uint8


def save_student(pipeline: str, folder: Path) -> str:
    """Save the teacher with a random projection of w, which has the speed of a student. Return the folder."""
    torch.manual_seed(0)
    family, process = load_family(pipeline), load_process(pipeline)
    student = family.with_w(load_network(pipeline), zero_init=False)
    scheduler = "LCMScheduler", {**process.config, "prediction_type": load_prediction_type(pipeline)}
    metadata = {"sampler": "consistency"}
    save_pipeline(
        folder, student, family=family, base=find(pipeline), scheduler=scheduler, metadata=metadata, dtype=torch.float32
    )
    return str(folder)


def ours(folder: str, dtype: torch.dtype, device: str, *, compile: bool = False, engine: Engine = "torch") -> Sampler:
    """Return the sampler of this program."""
    model = TextToImage.load(folder, device=device, dtype=dtype, compile=compile, engine=engine)

    @torch.inference_mode()  # as sample.py
    def images(prompts: list[str], steps: int, w: float) -> Tensor:
        return torch.cat(list(model.images(prompts, list(range(len(prompts))), steps=steps, w=w, batch_size=len(prompts))))

    return images


def diffusers(folder: str, dtype: torch.dtype, device: str) -> Sampler:
    """Return the sampler of diffusers. Its generators give each image the same noise as in `ours`."""
    pipe = LatentConsistencyModelPipeline.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True).to(device)
    pipe.set_progress_bar_config(disable=True)

    def images(prompts: list[str], steps: int, w: float) -> Tensor:
        options = {"num_inference_steps": steps, "guidance_scale": w + 1, "output_type": "pt"}
        generators = ImageNoise(list(range(len(prompts))), ()).generators
        return (pipe(prompts, generator=generators, **options).images.float() * 255).round().byte()

    return images


def timed(sample: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """Return the seconds on the clock and on the CPU, and the images."""
    started, cpu = now(), time.process_time()
    images = sample()
    return now() - started, time.process_time() - cpu, images.cpu()


def measure(
    *,
    pipeline: str,
    prompt: str,
    w: float,
    steps: list[int],
    batch_sizes: list[int],
    repeats: int,
    device: str,
    compile: bool,
    openvino: bool,
) -> Table:
    """Return the time of our sampler and of diffusers', by batch size and steps.

    pipeline: a teacher, saved as a student first. compile, openvino: also measure our sampler compiled, or by OpenVINO.
    """
    makers: dict[str, Callable[..., Sampler]] = {"diffusers": diffusers, "ours": ours}
    if compile:
        makers["ours compiled"] = partial(ours, compile=True)
    if openvino:
        makers["ours by OpenVINO"] = partial(ours, engine="openvino")
    rows = []
    with TemporaryDirectory() as folder:
        student = save_student(pipeline, Path(folder, "student"))
        samplers = {
            (name, str(dtype).removeprefix("torch.")): make(student, dtype, pick_device(device))
            for dtype in (torch.float32, torch.bfloat16)
            for name, make in makers.items()
        }
        for batch_size in batch_sizes:
            prompts = [f"{prompt}, number {i}" for i in range(batch_size)]
            for count in steps:
                runs = {", ".join(key): partial(timed, partial(s, prompts, count, w)) for key, s in samplers.items()}
                results = in_turn(runs, repeats + 1, lambda result: f"{1e3 * result[0]:.0f} ms")
                seconds = {name: min(result[0] for result in timings[1:]) for name, timings in results.items()}
                cpu = {name: min(result[1] for result in timings[1:]) for name, timings in results.items()}
                images = {name: timings[0][2].int() for name, timings in results.items()}
                for name, dtype in samplers:
                    key = f"{name}, {dtype}"
                    rows.append({
                        "images": batch_size,
                        "steps": count,
                        "sampler": key,
                        "ms": 1e3 * seconds[key],
                        "CPU ms": 1e3 * cpu[key],
                        "of diffusers' rate": seconds[f"diffusers, {dtype}"] / seconds[key],
                        "largest difference": int((images[key] - images["diffusers, float32"]).abs().max()),
                    })  # fmt: skip
    note = (
        f"Best of {repeats}, taken in turn, after one call that is not timed, with {torch.get_num_threads()} threads. Captions "
        "and the VAE are included. Differences are grey levels of 255 against diffusers in float32. In bfloat16 ours keeps the "
        "text encoder, the sampler and the VAE in float32."
    )
    return Table("Sampling", rows, note)
