"""Images from prompts, with a teacher or a student."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcm.core import sampling
from lcm.core.consistency import cm_consistency_fn
from lcm.core.denoiser import Denoiser
from lcm.core.process import Flow, Process
from lcm.core.random import ImageNoise
from lcm.core.timesteps import POINTS, consistency_steps, trailing_steps
from lcm.errors import UserError
from lcm.models import pipeline as pipelines
from lcm.models.codec import LatentCodec
from lcm.models.families import Family
from lcm.models.student import as_network

log = logging.getLogger(__name__)
Sampler = Callable[..., Tensor]
FEW_STEP = (sampling.consistency, sampling.tcd)  # samplers of students, which use the trained timesteps
OWN: dict[str, Sampler] = {"ddim": sampling.ddim, "consistency": sampling.consistency, "tcd": sampling.tcd}  # names in lcm.json


@dataclass
class LatentModel:
    """A network with all that makes images of prompts: family, process, prediction type and codec.

    facts: the content of `lcm.json`, see `pipeline.training_facts`. students: those of guided distillation, by number of steps.
    """

    family: Family
    net: Any
    process: Process
    prediction_type: str
    codec: LatentCodec
    facts: dict[str, Any] = field(default_factory=dict)
    students: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls, pipeline: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, compile: bool = False
    ) -> "LatentModel":
        """dtype: of the network, which takes nearly all the time; solvers, VAE and text encoders stay in float32.

        compile: networks and the VAE's decoder by torch.compile, when they are first called.
        """

        def load(name: str | None = None) -> Any:
            net = pipelines.load_network(pipeline, dtype, name=name).to(device).eval().requires_grad_(False)
            if compile:
                net.compile()
            return net

        net, codec = load(), pipelines.load_codec(pipeline).to(device)
        if compile:
            codec.vae.decoder.compile()
        facts = pipelines.training_facts(pipeline)
        *others, last = facts.get("students") or [None]
        students = {n: load(f"unet_{n}") for n in others} | ({last: net} if last else {})
        process, prediction_type = pipelines.load_process(pipeline).to(device), pipelines.load_prediction_type(pipeline)
        return cls(codec.text.family, net, process, prediction_type, codec, facts, students)

    @property
    def consistency(self) -> bool:
        """Whether the network is a student of a few-step sampler."""
        return self.facts.get("sampler", "ddim") != "ddim"

    def check_w(self, w: float) -> None:
        """A student answers for the w it was trained on; a teacher for any."""
        low, high = self.facts.get("w_min"), self.facts.get("w_max")
        if self.consistency and low is not None and high is not None and not low <= w <= high:
            log.warning("w=%g is outside the range [%g, %g] this model was trained on: expect worse images", w, low, high)

    def sampler(self, sampler: Sampler | None) -> tuple[Sampler, Callable[..., list[int]]]:
        """Return the given sampler, or the model's own, and the rule that places its timesteps."""
        own = self.facts.get("sampler", "ddim")
        if own not in OWN:
            raise UserError(f"lcm.json names the sampler {own!r}: use one of {', '.join(OWN)}")
        chosen = sampler or OWN[own]
        kind = getattr(chosen, "func", chosen)
        if kind not in FEW_STEP:
            return chosen, self.distilled_steps if self.students else trailing_steps
        if sampler is None and "gamma" in self.facts:
            chosen = partial(chosen, gamma=self.facts["gamma"])
        if "sigma_data" in self.facts:
            chosen = partial(chosen, f=partial(cm_consistency_fn, sigma_data=self.facts["sigma_data"]))
        if isinstance(self.process, Flow):
            return chosen, trailing_steps
        points = self.facts.get("points") or POINTS  # null for other timesteps, missing in older folders
        return chosen, partial(consistency_steps, points=points, trained=self.facts.get("timesteps"))

    def distilled_steps(self, steps: int, num_timesteps: int = 1000) -> list[int]:
        if steps not in self.students:
            raise UserError(f"steps={steps}: this model was distilled for {', '.join(map(str, self.students))} steps")
        return trailing_steps(steps, num_timesteps)

    @torch.no_grad()
    def latents(self, prompts: list[str], seeds: list[int], *, steps: int, w: float, sampler: Sampler | None = None) -> Tensor:
        """`[N, C, h, w]` for N prompts; image i depends on prompt i and seed i alone, not on the batch it is in."""
        run, place = self.sampler(sampler)
        timesteps = place(steps, self.process.num_timesteps)
        side = self.net.config["sample_size"]
        side = (side, side) if isinstance(side, int) else tuple(side)
        noise = ImageNoise(seeds, (self.net.config["in_channels"], *side), self.net.device)
        z = noise()
        cond, uncond = self.codec.conditions(prompts, z)
        ws = torch.full((len(prompts),), float(w), device=z.device)
        net = self.students.get(steps, self.net)
        denoiser = Denoiser(as_network(self.family, net), self.process, self.prediction_type)
        if self.consistency or self.family.takes_w(net) or w == 0:
            denoise = denoiser.bound(cond, ws)
        else:
            denoise = denoiser.guided(cond, uncond, ws)
        return run(denoise, z, timesteps, process=self.process, noise=noise)

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
