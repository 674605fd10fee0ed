"""Training steps as `train.py` runs them, beside the peers' step."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.profilers import SimpleProfiler

from lcm.app.cli import build
from lcm.app.composition import compose
from lcm.app.inputs import pick_device
from lcm.bench import peers
from lcm.bench.measure import Table, in_turn, now, peak_memory, reset_memory
from lcm.bench.shards import write_latents
from lcm.callbacks.throughput import Throughput
from lcm.data.datamodule import ShardDataModule
from lcm.data.urls import expand_urls
from lcm.models.flops import matmul_tflops

WARM_UP = 2  # steps that are not timed
FETCH = "[_TrainingEpochLoop].train_dataloader_next"  # Lightning's name of waiting for a batch


class Steps(NamedTuple):
    """Averages over the timed steps.

    seconds: the time of a step. waiting: the seconds of a step in which it waits for data. flop: the FLOP of a step.
    peak_memory: bytes on a GPU.
    """

    seconds: float
    waiting: float | None = None
    flop: float | None = None
    peak_memory: int | None = None


class Clock(L.Callback):
    """Record the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(now())


class Profiler(SimpleProfiler):
    """Lightning's profiler without its report."""

    def describe(self) -> None: ...


class Training:
    """An experiment. Each call trains it for `steps` more steps.

    prefill: encode one epoch first, so that the codec's cache holds every sample.
    """

    def __init__(self, overrides: list[str], *, steps: int, prefill: bool = False) -> None:
        self.cfg, self.steps = compose("train", overrides), steps
        self.data: ShardDataModule = build(self.cfg.data)
        self.module = build(self.cfg.model)
        if prefill:
            self.prefill()

    @torch.no_grad()
    def prefill(self) -> None:
        self.data.setup()
        assert self.data.codec is not None
        samples = sum(source.notes(shard).samples for source in self.data.train_sources for shard in range(len(source.urls)))
        for batch in islice(self.data.train_dataloader(), -(-samples // self.data.batch_size)):
            self.data.codec.posterior(batch["x"], batch["keys"])

    def __call__(self) -> Steps:
        reset_memory()
        clock, throughput, profiler = Clock(), Throughput(peak_tflops=1.0), Profiler()
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        options = {**build(self.cfg.trainer), **silent, "max_steps": WARM_UP + self.steps}
        L.Trainer(**options, callbacks=[throughput, clock], profiler=profiler).fit(self.module, self.data)
        for network in self.module.frozen.values():
            network.cpu()  # Lightning moves the module's own networks
        assert throughput.flop_per_image is not None
        return Steps(
            (clock.ends[-1] - clock.ends[WARM_UP - 1]) / self.steps,
            sum(profiler.recorded_durations[FETCH][WARM_UP:]) / self.steps,
            throughput.flop_per_image * self.data.batch_size,
            peak_memory(),
        )


def peer_training(overrides: list[str], *, shard: str, dtype: torch.dtype, steps: int) -> Callable[[], Steps]:
    """Train the networks, batch size and images of a distillation as the peers' script does."""
    cfg = compose("train", overrides)
    data, module, device = build(cfg.data), build(cfg.model), pick_device("auto")
    data.codec.vae.to(dtype=dtype, memory_format=torch.contiguous_format)
    for tower in data.codec.text.encoders:
        tower.to(dtype)
    batches = peers.image_loader(shard, size=data.resolution, batch_size=data.batch_size, workers=data.num_workers)
    networks = (module, module.frozen["teacher"], data.codec.vae, data.codec.text)

    def run() -> Steps:
        reset_memory()
        for network in networks:
            network.to(device)
        step = peers.distillation_step(module, data.codec, dtype)
        for batch in islice(batches, WARM_UP):
            step(*batch)
        started = now()
        for batch in islice(batches, steps):
            step(*batch)
        seconds = (now() - started) / steps
        for network in networks:
            network.to("cpu")
        return Steps(seconds, peak_memory=peak_memory())

    return run


def measure(
    *,
    shards: str,
    resolution: int,
    experiments: dict[str, list[str]],
    ways: dict[str, dict[str, Any]],
    peers_of: str,
    peer_precisions: list[str],
    steps: int,
    repeats: int,
    matmul_size: int,
) -> Table:
    """Return the time of a step of each experiment in each of `ways`. The experiment `peers_of` also has the peers' step.

    experiments: overrides of `train.py` by name. ways: `data` ("images", "cached", "latents") and `overrides` by name.
    peer_precisions: dtypes of the peers' autocast.
    """
    shard, device = expand_urls(shards)[0], pick_device("auto")
    common = [f"data.resolution={resolution}", *(f"++data.{key}=null" for key in ("val_shards", "build", "index"))]
    contenders: dict[str, Callable[[], Steps]] = {}
    batch_sizes: dict[str, int] = {}
    with TemporaryDirectory() as folder:
        for name, overrides in experiments.items():
            images = [*overrides, *common, f"data.shards={shard}", "data.codec.cache=false"]
            codec = build(compose("train", images).data.codec).to(device)
            latents = write_latents(shard, Path(folder, name), codec=codec, resolution=resolution)
            sources = {
                "images": images,
                "cached": [*overrides, *common, f"data.shards={shard}", "data.codec.cache=true"],
                "latents": [*overrides, *common, f"data.shards={latents}", "+data.latents=true"],
            }
            for precision in peer_precisions if name == peers_of else ():
                contenders[f"{name}|peers, {precision}"] = peer_training(
                    images, shard=shard, dtype=getattr(torch, precision), steps=steps
                )
            for way, options in ways.items():
                training = Training(
                    [*sources[options["data"]], *options.get("overrides", [])],
                    steps=steps,
                    prefill=options["data"] == "cached",
                )
                contenders[f"{name}|ours, {way}"], batch_sizes[name] = training, training.data.batch_size
        results = in_turn(contenders, repeats, lambda result: f"{1e3 * result.seconds:.0f} ms a step")
    best = {key: min(runs_of_step, key=lambda result: result.seconds) for key, runs_of_step in results.items()}
    ceiling = max(matmul_tflops(device, dtype, matmul_size) for dtype in (torch.bfloat16, torch.float32))
    peer = min((result.seconds for key, result in best.items() if "|peers" in key), default=None)
    rows = []
    for key, result in best.items():
        name, _, way = key.partition("|")
        tflops = None if result.flop is None else result.flop / result.seconds / 1e12
        rows.append({
            "training": name,
            "step": way.replace("_", " "),
            "ms a step": 1e3 * result.seconds,
            "images/s": batch_sizes[name] / result.seconds,
            "of the peers' rate": peer / result.seconds if peer is not None and name == peers_of else None,
            "TFLOP/s": tflops,
            "% of a matmul": None if tflops is None else round(100 * tflops / ceiling, 1),
            "peak GiB": None if result.peak_memory is None else round(result.peak_memory / 2**30, 1),
            "% waiting for data": None if result.waiting is None else round(100 * result.waiting / result.seconds, 1),
        })  # fmt: skip
    note = (
        f"Best of {repeats} x {steps} steps, taken in turn, after {WARM_UP} that are not timed, with "
        f"{torch.get_num_threads()} threads. Batches: {batch_sizes}. FLOPs are those of the networks in a step, without the "
        f"encoders. The matmul of {matmul_size} ran in the faster of bfloat16 and float32: {ceiling:.3g} TFLOP/s. Peers run "
        "the step of diffusers' LCM distillation script. The ratio is to the faster of their precisions."
    )
    return Table("Training steps", rows, note)
