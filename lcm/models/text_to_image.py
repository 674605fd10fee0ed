"""Sampling of images from prompts, with a teacher or a student."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm.core import sampling
from lcm.core.consistency import cm_consistency_fn
from lcm.core.denoiser import Denoiser
from lcm.core.errors import UserError
from lcm.core.numbers import Engine
from lcm.core.process import Flow, Process
from lcm.core.random import ImageNoise
from lcm.core.timesteps import POINTS, consistency_steps, trailing_steps
from lcm.models import graphs
from lcm.models import pipeline as pipelines
from lcm.models.attention import check_compiler
from lcm.models.codec import LatentCodec
from lcm.models.families import Family
from lcm.models.lora import fuse_adapters
from lcm.models.student import as_network

log = logging.getLogger(__name__)
Sampler = Callable[..., Tensor]
FEW_STEP = (sampling.consistency, sampling.tcd)  # samplers that use the trained timesteps
# The samplers by their names in lcm.json.
SAMPLERS: dict[str, Sampler] = {"ddim": sampling.ddim, "consistency": sampling.consistency, "tcd": sampling.tcd}


@dataclass(frozen=True)
class Start:
    """A picture that sampling starts from, instead of pure noise.

    image: uint8 `[3, H, W]`. strength: the share of the schedule that is sampled, above 0 and at most 1. mask: float
    `[1, H, W]`, 1 where the picture is drawn anew, 0 where it is kept. None: all of it is drawn anew.
    """

    image: Tensor
    strength: float
    mask: Tensor | None = None


@dataclass
class TextToImage:
    """A network with its family, process, prediction type and codec.

    metadata: the content of `lcm.json`, see `pipeline.read_lcm_json`. students: the networks of guided distillation, by number
    of sampling steps.
    """

    family: Family
    net: Any
    process: Process
    prediction_type: str
    codec: LatentCodec
    metadata: dict[str, Any] = field(default_factory=dict)
    students: dict[int, Any] = field(default_factory=dict)
    engine: Engine = "torch"

    @classmethod
    def load(
        cls,
        pipeline: str,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        lora: Mapping[str, float] = MappingProxyType({}),
        engine: Engine = "torch",
    ) -> "TextToImage":
        """Load a pipeline, see `pipeline.find`.

        dtype: the dtype of the network. Solvers, VAE and text encoders use float32. compile: compile the networks and the VAE's
        decoder at the first call. lora: the weight of each file of adapters, which are merged into network and text encoders.
        engine: "torch", or "openvino" for the networks and the VAE's decoder on a CPU, see `graphs.Graph`.
        """
        if compile:
            check_compiler("compile")
        if engine == "openvino":
            check_engine(device, dtype, compile)

        def load(name: str | None = None) -> Any:
            stored = torch.float32 if engine == "openvino" else dtype
            net = pipelines.load_network(folder, stored, name=name).to(device).eval().requires_grad_(False)
            if compile:
                net.compile()
            return net

        folder = pipelines.find(pipeline)  # once, as a hub id needs a request
        if engine == "openvino":
            graphs.check(pipelines.load_family(folder), "openvino", "engine=openvino")
        net, codec = load(), pipelines.load_codec(folder).to(device)
        if compile:
            codec.vae.decoder.compile()
        metadata = pipelines.read_lcm_json(folder)
        *others, last = metadata.get("students") or [None]
        students = {n: load(f"unet_{n}") for n in others} | ({last: net} if last else {})
        if lora and students:
            raise UserError(f"lora: {pipeline} holds a network for each number of steps, and adapters fit one: leave lora out")
        for file, weight in lora.items():
            fuse_adapters(codec.text.family, net, codec, Path(file), weight)
        if engine == "openvino":
            for network in {net, *students.values()}:
                network.forward = graphs.Graph(graphs.unet(network, codec), network_identity(network), dtype)
            vae = codec.vae.to(memory_format=torch.contiguous_format)
            vae.decode = graphs.Graph(graphs.vae_decoder(vae), network_identity(vae), torch.float32)
        process, prediction_type = pipelines.load_process(folder).to(device), pipelines.load_prediction_type(folder)
        return cls(codec.text.family, net, process, prediction_type, codec, metadata, students, engine)

    @property
    def consistency(self) -> bool:
        """Return whether the network is a student with a few-step sampler."""
        return self.metadata.get("sampler", "ddim") != "ddim"

    @property
    def takes_w(self) -> bool:
        """Return whether w has an effect, through an input of the network or through classifier-free guidance."""
        return self.guided or self.family.takes_w(self.net)

    @property
    def guided(self) -> bool:
        """Return whether w is classifier-free guidance: of a teacher, or of a student that was distilled without guidance."""
        unguided = self.metadata.get("classifier_free_guidance", False)
        return (not self.consistency or unguided) and not self.family.takes_w(self.net)

    @property
    def default_w(self) -> float:
        return 4.0 if self.takes_w else 0.0

    def check(self, settings: Mapping[str, Any], sampler: Sampler | None = None, start: Start | None = None) -> None:
        """Raise UserError if "steps", "w" or "negative" of the settings cannot be drawn or have no effect."""
        self.check_w(settings["w"])
        self.check_negative(settings["negative"], settings["w"])
        self.timesteps(settings["steps"], sampler, 1.0 if start is None else start.strength)

    def check_w(self, w: float, option: str = "w") -> None:
        """Raise UserError if w has no effect or is infinite. Warn if it is outside the range of a student's training."""
        if not math.isfinite(w):
            raise UserError(f"{option}={w:g} is not a finite number: set {option}=4, for example")
        if w != 0 and not self.takes_w:
            raise UserError(f"{option}={w:g}: this consistency model has no input for w, its guidance is fixed: set {option}=0")
        low, high = self.metadata.get("w_min"), self.metadata.get("w_max")
        if low is not None and high is not None and not low <= w <= high:
            log.warning("w=%g is outside the range [%g, %g] this model was trained on: expect worse images", w, low, high)

    def check_negative(self, negative: str, w: float) -> None:
        """Raise UserError if a negative prompt has no effect."""
        if negative and not self.guided:
            raise UserError(
                f"negative={negative!r} has no effect: this model is not guided when it is sampled: use a teacher, or distil a "
                "student with experiment=pcm_cfg_mini"
            )
        if negative and w == 0:
            raise UserError(f"negative={negative!r} has no effect without guidance: set w above 0")

    def size(self, size: int | Sequence[int] | None = None, option: str = "size") -> tuple[int, int]:
        """Return (height, width) in pixels of `size`; None: the size of the training images. Raises UserError if invalid."""
        factor = self.codec.factor
        if size is not None:
            return checked_size(size, factor, option)
        if (side := self.net.config["sample_size"]) is None:
            raise UserError(f"the model's {self.family.network}/config.json has no sample_size: set {option}=<pixels>")
        height, width = (side, side) if isinstance(side, int) else side
        return height * factor, width * factor

    def identity(self) -> dict[str, Any]:
        """Return everything that images depend on, except prompt, seed, size, steps, w, sampler, dtype and program version."""
        networks = (self.net, *self.students.values(), self.codec.vae, *self.codec.text.encoders)
        return {
            "weights": fingerprint(*networks),
            "process": self.process.config,
            "prediction_type": self.prediction_type,
            "latent_scaling": self.family.latent_scaling(self.codec.vae),
            "facts": self.metadata,
            "consistency": self.consistency,
            **({} if self.engine == "torch" else {"engine": self.engine}),
        }

    def sampler(self, sampler: Sampler | None) -> tuple[Sampler, Callable[..., list[int]]]:
        """Return the sampler, and the function `(steps, num_timesteps) -> timesteps`. None: the model's own sampler."""
        name = self.metadata.get("sampler", "ddim")
        if name not in SAMPLERS:
            raise UserError(f"lcm.json names the sampler {name!r}: use one of {', '.join(SAMPLERS)}")
        model_sampler = sampler or SAMPLERS[name]
        if getattr(model_sampler, "func", model_sampler) not in FEW_STEP:
            return model_sampler, self.distilled_steps if self.students else trailing_steps
        if sampler is None and "gamma" in self.metadata:
            model_sampler = partial(model_sampler, gamma=self.metadata["gamma"])
        if "sigma_data" in self.metadata:
            model_sampler = partial(model_sampler, f=partial(cm_consistency_fn, sigma_data=self.metadata["sigma_data"]))
        if isinstance(self.process, Flow):
            return model_sampler, self.in_all_phases(trailing_steps)
        points = self.metadata.get("points") or POINTS  # null if the timesteps are not a grid, missing in older folders
        return model_sampler, self.in_all_phases(
            partial(consistency_steps, points=points, trained=self.metadata.get("timesteps"))
        )

    def in_all_phases(self, choose_timesteps: Callable[..., list[int]]) -> Callable[..., list[int]]:
        """Return `choose_timesteps` with a check: a student of several phases makes one step in each, else a UserError."""
        phases = self.metadata.get("phases")

        def checked(steps: int, num_timesteps: int = 1000) -> list[int]:
            if phases is not None and steps != phases:
                raise UserError(f"steps={steps}: this model was distilled in {phases} phases: set steps={phases}")
            return choose_timesteps(steps, num_timesteps)

        return checked

    def timesteps(self, steps: int, sampler: Sampler | None = None, strength: float = 1.0) -> list[int]:
        """Return the descending timesteps of sampling. Raises UserError if the model cannot be sampled in this number of steps.

        strength: the sampled share of the schedule, counted from the clean end. All `steps` lie in this share. A student that
        was distilled for a number of steps makes fewer instead: its usual timesteps within the share.
        """
        choose_timesteps, total = self.sampler(sampler)[1], self.process.num_timesteps
        timesteps = choose_timesteps(steps, total)
        if strength == 1:
            return timesteps
        if self.students or self.metadata.get("phases"):
            return timesteps[-max(1, round(strength * steps)) :]
        try:
            return choose_timesteps(round(steps / strength), total)[-steps:]
        except UserError:
            raise UserError(
                f"strength={strength:g}: this share of the model's timesteps has fewer than steps={steps}: raise strength, or "
                "lower steps"
            ) from None

    def distilled_steps(self, steps: int, num_timesteps: int = 1000) -> list[int]:
        """Return the timesteps of a student of guided distillation. Raises UserError for another number of steps."""
        if steps not in self.students:
            raise UserError(
                f"steps={steps}: this model was distilled for {', '.join(map(str, self.students))} steps: set one of these"
            )
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
        negative: str = "",
        start: Start | None = None,
    ) -> Tensor:
        """Return latents `[N, C, h, w]` of N prompts. Latent i depends on prompt i and seed i, not on the batch.

        sampler: None uses the model's own sampler. negative: the prompt that guidance moves away from, see `check_negative`.
        start: a picture of this size; None starts from noise. size: (height, width) in pixels, or one number for both; None
        uses the size of the training images. The network runs in evaluation mode.
        """
        timesteps = self.timesteps(steps, sampler, 1.0 if start is None else start.strength)
        sides = [side // self.codec.factor for side in self.size(size)]
        noise = ImageNoise(seeds, (self.net.config["in_channels"], *sides), self.net.device)
        z = noise()
        cond, uncond = self.codec.conditions(prompts, z)
        ws = torch.full((len(prompts),), float(w), device=z.device)
        net = self.students.get(steps, self.net)
        denoiser = Denoiser(as_network(self.family, net), self.process, self.prediction_type)
        if negative:
            uncond, _ = self.codec.conditions([negative], z[:1])
        denoise = denoiser.guided(cond, uncond, ws) if self.guided and w else denoiser.bound(cond, ws)
        known, mask = None, None
        if start is not None:
            known = self.codec.encode_mean(start.image[None].to(z.device))
            z = self.process.jump(known, z, torch.full_like(ws, timesteps[0], dtype=torch.int64))
            if start.mask is not None:
                # A latent is drawn if any of its pixels is.
                mask = F.max_pool2d(start.mask[None].to(z.device), self.codec.factor)
                denoise = sampling.keep_known(denoise, known, mask, self.process)
        with evaluation_mode(net):
            drawn = self.sampler(sampler)[0](denoise, z, timesteps, process=self.process, noise=noise)
        return drawn if mask is None or known is None else known.lerp(drawn, mask)

    def images(self, prompts: list[str], seeds: list[int], *, batch_size: int = 64, **options: Any) -> Iterator[Tensor]:
        """Yield batches of uint8 images `[<= batch_size, 3, H, W]` in the order of the prompts. Raises NonFiniteError.

        options: the keyword arguments of `latents`.
        """
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        for i in range(0, len(prompts), batch_size):
            batch = slice(i, i + batch_size)
            yield self.codec.decode(self.latents(prompts[batch], seeds[batch], **options))


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode, and restore each module's mode afterwards."""
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def checked_size(size: Any, factor: int, option: str = "size") -> tuple[int, int]:
    """Return (height, width) in pixels. Raises UserError unless both are positive multiples of the VAE's factor."""
    sides = [size, size] if isinstance(size, int) else size
    integers = isinstance(sides, Sequence) and all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not integers or len(sides) != 2 or min(sides) < factor:
        raise UserError(
            f"{option}={size}: expected pixels, from {factor} on: {option}=512, or [height,width] as {option}=[768,512]"
        )
    if uneven := [side for side in sides if side % factor]:
        lower = uneven[0] - uneven[0] % factor
        raise UserError(
            f"{option}={size}: {uneven[0]} is not a multiple of the VAE's factor {factor}: use {lower} or {lower + factor}"
        )
    return sides[0], sides[1]


def check_engine(device: str, dtype: torch.dtype, compile: bool) -> None:
    """Raise UserError for an option that has no effect on OpenVINO."""
    if device != "cpu":
        raise UserError(f"device={device} has no effect on engine=openvino, which runs on the CPU: leave device out")
    if compile:
        raise UserError("compile=true has no effect on engine=openvino: leave compile out")
    if dtype == torch.float16:
        raise UserError("dtype=float16: engine=openvino computes in float32 or bfloat16: set one of them")


def network_identity(network: Any) -> list[Any]:
    """Return the identity of a network: its class, its config and the digest of its weights."""
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return [type(network).__name__, config, fingerprint(network)]


def fingerprint(*networks: nn.Module) -> str:
    """Return 16 hex digits of the SHA-256 of the networks' weights and buffers."""
    sha = hashlib.sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            sha.update(name.encode() + value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
