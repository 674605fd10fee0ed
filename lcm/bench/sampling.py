"""Few-step sampling, ours beside diffusers' LatentConsistencyModelPipeline: the same weights, the same noise."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import LatentConsistencyModelPipeline
from torch import Tensor

from lcm.app.inputs import pick_device
from lcm.bench.measure import Table, in_turn
from lcm.core.random import ImageNoise
from lcm.models.pipeline import find, load_family, load_network, load_prediction_type, load_process
from lcm.models.saving import save_pipeline
from lcm.models.text_to_image import TextToImage


def student_of(pipeline: str, folder: Path) -> str:
    """The teacher with a random projection of w, saved as a student: its images are poor, its speed is a student's."""
    torch.manual_seed(0)
    family, process = load_family(pipeline), load_process(pipeline)
    student = family.with_w(load_network(pipeline), zero_init=False)
    scheduler = "LCMScheduler", {**process.config, "prediction_type": load_prediction_type(pipeline)}
    facts = {"sampler": "consistency"}
    save_pipeline(folder, student, family=family, base=find(pipeline), scheduler=scheduler, metadata=facts, dtype=torch.float32)
    return str(folder)


def ours(folder: str, dtype: torch.dtype, device: str, *, compile: bool = False) -> Callable[..., Tensor]:
    model = TextToImage.load(folder, device=device, dtype=dtype, compile=compile)

    @torch.inference_mode()  # as sample.py
    def images(prompts: list[str], steps: int, w: float) -> Tensor:
        return torch.cat(list(model.images(prompts, list(range(len(prompts))), steps=steps, w=w, batch_size=len(prompts))))

    return images


def diffusers(folder: str, dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """An image's generator gives it the noise that `ours` gives it."""
    pipe = LatentConsistencyModelPipeline.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True).to(device)
    pipe.set_progress_bar_config(disable=True)

    def images(prompts: list[str], steps: int, w: float) -> Tensor:
        options = {"num_inference_steps": steps, "guidance_scale": w + 1, "output_type": "pt"}
        generators = ImageNoise(list(range(len(prompts))), ()).generators
        return (pipe(prompts, generator=generators, **options).images.float() * 255).round().byte()

    return images


def timed(sample: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    images = sample().cpu()
    return time.perf_counter() - started, images


def said(result: tuple[float, Tensor]) -> str:
    return f"{1e3 * result[0]:.0f} ms"


def measure(
    *, pipeline: str, prompt: str, w: float, steps: list[int], batch_sizes: list[int], repeats: int, device: str, compile: bool
) -> Table:
    """pipeline: a teacher, of which a student's folder is made. compile: ours is measured compiled, too."""
    rows, samplers = [], {"diffusers": diffusers, "ours": ours}
    if compile:
        samplers["ours compiled"] = partial(ours, compile=True)
    with TemporaryDirectory() as folder:
        student = student_of(pipeline, Path(folder, "student"))
        makers = {
            f"{name}, {str(dtype).removeprefix('torch.')}": make(student, dtype, pick_device(device))
            for dtype in (torch.float32, torch.bfloat16)
            for name, make in samplers.items()
        }
        reference = next(iter(makers))
        for batch_size in batch_sizes:
            for count in steps:
                prompts = [f"{prompt}, number {i}" for i in range(batch_size)]
                runs = {name: partial(timed, partial(make, prompts, count, w)) for name, make in makers.items()}
                found = {name: results[1:] for name, results in in_turn(runs, repeats + 1, said).items()}
                seconds = {name: min(time for time, _ in results) for name, results in found.items()}
                images = {name: results[0][1].int() for name, results in found.items()}
                for name in makers:
                    off = (images[name] - images[reference]).abs()
                    rows.append({
                        "images": batch_size, "steps": count, "sampler": name, "ms": 1e3 * seconds[name],
                        "images/s": batch_size / seconds[name],
                        "of diffusers' rate": seconds[f"diffusers, {name.partition(', ')[2]}"] / seconds[name],
                        "largest difference": int(off.max()), "mean difference": float(off.float().mean()),
                    })  # fmt: skip
    note = (
        f"Best of {repeats}, taken in turn, after one that does not count, with {torch.get_num_threads()} threads; captions "
        f"and VAE included. Differences are grey levels (of 255) against {reference}. In bfloat16 ours keeps the text "
        "encoder, the sampler and the VAE in float32."
    )
    return Table("Sampling", rows, note)
