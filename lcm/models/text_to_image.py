"""Images from prompts, with a teacher or a student."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lcm.core import sampling
from lcm.core.consistency import cm_consistency_fn
from lcm.core.denoiser import Denoiser
from lcm.core.errors import UserError
from lcm.core.process import Flow, Process
from lcm.core.random import ImageNoise
from lcm.core.timesteps import POINTS, consistency_steps, trailing_steps
from lcm.models import pipeline as pipelines
from lcm.models.attention import check_compiler
from lcm.models.codec import LatentCodec
from lcm.models.families import Family
from lcm.models.student import as_network

log = logging.getLogger(__name__)
Sampler = Callable[..., Tensor]
FEW_STEP = (sampling.consistency, sampling.tcd)  # samplers of students, which use the trained timesteps
OWN: dict[str, Sampler] = {"ddim": sampling.ddim, "consistency": sampling.consistency, "tcd": sampling.tcd}  # names in lcm.json


@dataclass
class TextToImage:
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
    ) -> "TextToImage":
        """dtype: of the network, which takes nearly all the time; solvers, VAE and text encoders stay in float32.

        compile: networks and the VAE's decoder by torch.compile, when they are first called.
        """

        if compile:
            check_compiler("compile")

        def load(name: str | None = None) -> Any:
            net = pipelines.load_network(folder, dtype, name=name).to(device).eval().requires_grad_(False)
            if compile:
                net.compile()
            return net

        folder = pipelines.find(pipeline)  # once: a hub id is looked up each time
        net, codec = load(), pipelines.load_codec(folder).to(device)
        if compile:
            codec.vae.decoder.compile()
        facts = pipelines.training_facts(folder)
        *others, last = facts.get("students") or [None]
        students = {n: load(f"unet_{n}") for n in others} | ({last: net} if last else {})
        process, prediction_type = pipelines.load_process(folder).to(device), pipelines.load_prediction_type(folder)
        return cls(codec.text.family, net, process, prediction_type, codec, facts, students)

    @property
    def consistency(self) -> bool:
        """Whether the network is a student of a few-step sampler."""
        return self.facts.get("sampler", "ddim") != "ddim"

    @property
    def takes_w(self) -> bool:
        """Whether w changes its images: by an input of its own, or by guidance."""
        return not self.consistency or self.family.takes_w(self.net)

    def check_w(self, w: float, option: str = "w") -> None:
        """Raise UserError for a w that changes nothing; warn of one outside a student's range. A teacher takes any w."""
        if w != 0 and not self.takes_w:
            raise UserError(f"{option}={w:g}: this consistency model has no input for w, its guidance is fixed: set {option}=0")
        low, high = self.facts.get("w_min"), self.facts.get("w_max")
        if low is not None and high is not None and not low <= w <= high:
            log.warning("w=%g is outside the range [%g, %g] this model was trained on: expect worse images", w, low, high)

    def size(self, asked: int | Sequence[int] | None = None, option: str = "size") -> tuple[int, int]:
        """Return (height, width) in pixels as asked for, by default those of the training. Raises UserError."""
        factor = self.codec.factor
        if asked is not None:
            return checked_size(asked, factor, option)
        if (side := self.net.config["sample_size"]) is None:
            raise UserError(f"the model's {self.family.network}/config.json has no sample_size: set {option}=<pixels>")
        height, width = (side, side) if isinstance(side, int) else side
        return height * factor, width * factor

    def identity(self) -> dict[str, Any]:
        """What its images depend on besides prompt, seed, size, steps, w, solver, dtype and this program's code."""
        networks = (self.net, *self.students.values(), self.codec.vae, *self.codec.text.encoders)
        return {
            "weights": fingerprint(*networks),
            "process": self.process.config,
            "facts": self.facts,
            "consistency": self.consistency,
        }

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

    def check_steps(self, steps: int, sampler: Sampler | None = None) -> None:
        """Raise UserError for a number of steps that the model or its schedule does not have."""
        self.sampler(sampler)[1](steps, self.process.num_timesteps)

    def distilled_steps(self, steps: int, num_timesteps: int = 1000) -> list[int]:
        if steps not in self.students:
            raise UserError(f"steps={steps}: this model was distilled for {', '.join(map(str, self.students))} steps")
        return trailing_steps(steps, num_timesteps)

    @torch.no_grad()
    def latents(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        steps: int,
        w: float,
        sampler: Sampler | None = None,
        size: int | Sequence[int] | None = None,
    ) -> Tensor:
        """`[N, C, h, w]` for N prompts; image i depends on prompt i and seed i alone, not on the batch it is in.

        size: (height, width) in pixels, or both as one number; None: those of the training. The network is in evaluation mode.
        """
        run, place = self.sampler(sampler)
        timesteps = place(steps, self.process.num_timesteps)
        sides = [side // self.codec.factor for side in self.size(size)]
        noise = ImageNoise(seeds, (self.net.config["in_channels"], *sides), self.net.device)
        z = noise()
        cond, uncond = self.codec.conditions(prompts, z)
        ws = torch.full((len(prompts),), float(w), device=z.device)
        net = self.students.get(steps, self.net)
        denoiser = Denoiser(as_network(self.family, net), self.process, self.prediction_type)
        if self.consistency or self.family.takes_w(net) or w == 0:
            denoise = denoiser.bound(cond, ws)
        else:
            denoise = denoiser.guided(cond, uncond, ws)
        with evaluation_mode(net):
            return run(denoise, z, timesteps, process=self.process, noise=noise)

    def images(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        steps: int,
        w: float,
        sampler: Sampler | None = None,
        size: int | Sequence[int] | None = None,
        batch_size: int = 64,
    ) -> Iterator[Tensor]:
        """Batches of uint8 images `[<= batch_size, 3, H, W]`, in the order of the prompts. Raises NonFiniteError."""
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        for i in range(0, len(prompts), batch_size):
            part = slice(i, i + batch_size)
            z0 = self.latents(prompts[part], seeds[part], steps=steps, w=w, sampler=sampler, size=size)
            yield self.codec.decode(z0)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Switch off what only training does, such as dropout, in every part; then each part is as before."""
    training = [part for part in network.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def checked_size(size: Any, factor: int, option: str = "size") -> tuple[int, int]:
    """Return (height, width) in pixels. Raises UserError for what is no size, or no multiple of the VAE's factor."""
    sides = [size, size] if isinstance(size, int) else size
    whole = isinstance(sides, Sequence) and all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not whole or len(sides) != 2 or min(sides) < factor:
        raise UserError(
            f"{option}={size}: expected pixels, from {factor} on: {option}=512, or [height,width] as {option}=[768,512]"
        )
    if odd := [side for side in sides if side % factor]:
        lower = odd[0] - odd[0] % factor
        raise UserError(
            f"{option}={size}: {odd[0]} is not a multiple of the VAE's factor {factor}: use {lower} or {lower + factor}"
        )
    return sides[0], sides[1]


def fingerprint(*networks: nn.Module) -> str:
    """16 hex digits of the networks' weights and buffers."""
    sha = hashlib.sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            sha.update(name.encode() + value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
