"""Images from prompts, with a teacher or a student."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lcm.core import sampling
from lcm.core.consistency import cm_consistency_fn
from lcm.core.networks import conditioned, guided
from lcm.core.random import ImageNoise
from lcm.core.schedule import NoiseSchedule
from lcm.core.timesteps import POINTS, consistency_steps, trailing_steps
from lcm.data.codec import LatentCodec
from lcm.errors import UserError
from lcm.models import pipeline as pipelines
from lcm.models.kernels import check_compiler
from lcm.models.student import as_network

log = logging.getLogger(__name__)
Sampler = Callable[..., Tensor]


@dataclass
class LatentModel:
    """A UNet with what it takes to make images: schedule and codec. `consistency`: a student, sampled by Algorithm 3.

    facts: what `lcm.json` says of the training. students: those of guided distillation, by their number of steps.
    """

    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    codec: LatentCodec
    consistency: bool
    facts: dict[str, Any] = field(default_factory=dict)
    students: dict[int, UNet2DConditionModel] = field(default_factory=dict)

    @classmethod
    def load(
        cls, pipeline: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, compile: bool = False
    ) -> "LatentModel":
        """dtype: of the UNet, which takes nearly all the time; solvers, VAE and text encoder stay in float32.

        compile: UNets and the VAE's decoder by torch.compile, when they are first called.
        """

        if compile:
            check_compiler("compile")

        def load(name: str) -> UNet2DConditionModel:
            unet = pipelines.load_unet(folder, dtype, name=name).to(device).eval().requires_grad_(False)
            if compile:
                unet.compile()
            return unet

        folder = pipelines.find(pipeline)  # once: a hub id is looked up each time
        unet, codec = load("unet"), pipelines.load_codec(folder).to(device)
        if compile:
            codec.vae.decoder.compile()
        facts, consistency = pipelines.training_facts(folder), pipelines.is_consistency_model(folder)
        *others, last = facts.get("students") or [None]
        students = {n: load(f"unet_{n}") for n in others} | ({last: unet} if last else {})
        return cls(unet, pipelines.load_schedule(folder).to(device), codec, consistency, facts, students)

    def check_w(self, w: float) -> None:
        """A student answers for the w it was trained on; a teacher for any."""
        low, high = self.facts.get("w_min"), self.facts.get("w_max")
        if self.consistency and low is not None and high is not None and not low <= w <= high:
            log.warning("w=%g is outside the range [%g, %g] this model was trained on: expect worse images", w, low, high)

    def sampler(self, sampler: Sampler | None) -> tuple[Sampler, Callable[..., list[int]]]:
        """The given sampler, or the model's natural one, and the rule that places its timesteps."""
        chosen: Sampler = sampler or (sampling.consistency if self.consistency else sampling.ddim)
        if getattr(chosen, "func", chosen) is not sampling.consistency:
            return chosen, self.distilled_steps if self.students else trailing_steps
        points = self.facts.get("points") or POINTS  # null of other timesteps, missing in older folders
        place = partial(consistency_steps, points=points, trained=self.facts.get("timesteps"))
        if "sigma_data" not in self.facts:
            return chosen, place
        f = partial(cm_consistency_fn, schedule=self.schedule, sigma_data=self.facts["sigma_data"])
        return partial(chosen, f=f), place

    def distilled_steps(self, steps: int, num_timesteps: int = 1000) -> list[int]:
        if steps not in self.students:
            raise UserError(f"steps={steps}: this model was distilled for {', '.join(map(str, self.students))} steps")
        return trailing_steps(steps, num_timesteps)

    @torch.no_grad()
    def latents(self, prompts: list[str], seeds: list[int], *, steps: int, w: float, sampler: Sampler | None = None) -> Tensor:
        """`[N, C, h, w]` for N prompts; image i depends on prompt i and seed i alone, not on the batch it is in."""
        run, place = self.sampler(sampler)
        timesteps = place(steps, self.schedule.num_timesteps)
        side = self.unet.config["sample_size"]
        side = (side, side) if isinstance(side, int) else tuple(side)
        noise = ImageNoise(seeds, (self.unet.config["in_channels"], *side), self.unet.device)
        z = noise()
        cond, uncond = self.codec.conditions(prompts, z)
        ws = torch.full((len(prompts),), float(w), device=self.unet.device)
        net = as_network(self.students.get(steps, self.unet))
        if self.consistency or self.unet.config["time_cond_proj_dim"] is not None or w == 0:
            denoise = conditioned(net, cond, self.schedule, ws)
        else:
            denoise = guided(net, cond, uncond, self.schedule, ws)
        return run(denoise, z, timesteps, schedule=self.schedule, noise=noise)

    def images(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        steps: int,
        w: float,
        sampler: Sampler | None = None,
        batch_size: int = 64,
    ) -> Iterator[Tensor]:
        """Batches of uint8 images `[<= batch_size, 3, S, S]`, in the order of the prompts."""
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        for i in range(0, len(prompts), batch_size):
            part = slice(i, i + batch_size)
            yield self.codec.decode(self.latents(prompts[part], seeds[part], steps=steps, w=w, sampler=sampler))
