"""Training steps as `train.py` runs them, beside the peers' step, all in one run."""

from collections.abc import Callable
from functools import partial
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
from lcm.bench.measure import Table, data_sheet_tflops, elapsed, in_turn, now, peak_memory, released
from lcm.bench.shards import write_latents
from lcm.callbacks.throughput import Throughput
from lcm.data.datamodule import ShardDataModule
from lcm.data.shards import expand_urls
from lcm.models.flops import matmul_tflops

WARM_UP = 2  # steps that are not timed


class Steps(NamedTuple):
    """Of one step: seconds, seconds of processor time, those in which it waits for the loader, those in the encoders; FLOP.

    peak_memory: bytes on a GPU.
    """

    seconds: float
    cpu: float
    waiting: float | None = None
    encoding: float | None = None
    flop: float | None = None
    peak_memory: int | None = None


class Clock(L.Callback):
    """Times the steps after the first `WARM_UP`."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(now())


class Profiler(SimpleProfiler):
    """Lightning's, without the page that it prints at the end."""

    def describe(self) -> None: ...


class Training:
    """An experiment on given data; each call trains it a few steps more."""

    def __init__(self, overrides: list[str], *, steps: int, prefill: bool = False) -> None:
        self.cfg, self.steps = compose("train", overrides), steps
        self.data: ShardDataModule = build(self.cfg.data)
        self.module = build(self.cfg.model)
        if prefill:
            self.prefill()

    @torch.no_grad()
    def prefill(self) -> None:
        """An epoch of encoding, so that the codec's cache has every sample."""
        self.data.setup()
        assert self.data.codec is not None
        for batch in islice(self.data.train_dataloader(), -(-sum(self.data.sizes) // self.data.batch_size)):
            self.data.codec.posterior(batch["x"], batch["keys"])

    def __call__(self) -> Steps:
        released()
        clock, arithmetic, profiler = Clock(), Throughput(peak_tflops=1.0), Profiler()
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        options = {**build(self.cfg.trainer), **silent, "max_steps": WARM_UP + self.steps}
        L.Trainer(**options, callbacks=[arithmetic, clock], profiler=profiler).fit(self.module, self.data)
        for network in self.module.frozen.values():
            network.cpu()  # as Lightning does with the module itself
        assert arithmetic.flop_per_image is not None
        spent = {name: sum(times[WARM_UP:]) / self.steps for name, times in profiler.recorded_durations.items()}
        return Steps(
            *elapsed(clock.ends[WARM_UP - 1], clock.ends[-1], self.steps),
            spent["[_TrainingEpochLoop].train_dataloader_next"],
            spent["[LightningDataModule]ShardDataModule.on_after_batch_transfer"],
            arithmetic.flop_per_image * self.data.batch_size,
            peak_memory(),
        )


def peer_training(overrides: list[str], *, shard: str, dtype: torch.dtype, steps: int) -> Callable[[], Steps]:
    """The same networks, batch size and images as a `Training` of distillation, trained as the peers' script does it."""
    cfg = compose("train", overrides)
    data, module, device = build(cfg.data), build(cfg.model), pick_device("auto")
    data.codec.vae.to(dtype=dtype, memory_format=torch.contiguous_format)
    for tower in data.codec.text.encoders:
        tower.to(dtype)
    batches = peers.image_loader(shard, size=data.resolution, batch_size=data.batch_size, workers=data.num_workers)
    parts = (module, module.frozen["teacher"], data.codec.vae, data.codec.text)

    def run() -> Steps:
        released()
        for part in parts:
            part.to(device)
        step = peers.distillation_step(module, data.codec, dtype)
        for batch in islice(batches, WARM_UP):
            step(*batch)
        started = now()
        for batch in islice(batches, steps):
            step(*batch)
        taken = elapsed(started, now(), steps)
        for part in parts:
            part.to("cpu")
        return Steps(*taken, peak_memory=peak_memory())

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
    """experiments: names with the overrides of `train.py`; ways: names with the data that each is trained from ("images",
    "cached", "latents") and more overrides; peers_of: the distillation that the peers' step trains, too, in each of
    `peer_precisions`."""
    shard, device = expand_urls(shards)[0], pick_device("auto")
    common = [f"data.resolution={resolution}", *(f"++data.{k}=null" for k in ("val_shards", "build", "index"))]
    with TemporaryDirectory() as folder:
        contenders: dict[str, Callable[[], Steps]] = {}
        for name, overrides in experiments.items():
            of = [*overrides, *common]
            images = [*of, f"data.shards={shard}", "data.codec.cache=false"]
            codec = build(compose("train", images).data.codec).to(device)
            latents = write_latents(shard, Path(folder, name), codec=codec, resolution=resolution)
            sources = {
                "images": images,
                "cached": [*of, f"data.shards={shard}", "data.codec.cache=true"],
                "latents": [*of, f"data.shards={latents}", "+data.latents=true"],
            }
            for precision in peer_precisions if name == peers_of else ():
                contenders[f"{name}|peers, {precision}"] = peer_training(
                    images, shard=shard, dtype=getattr(torch, precision), steps=steps
                )
            for way, options in ways.items():
                training = [*sources[options["data"]], *options.get("overrides", [])]
                contenders[f"{name}|ours, {way}"] = Training(training, steps=steps, prefill=options["data"] == "cached")
        batch_sizes = {key.partition("|")[0]: c.data.batch_size for key, c in contenders.items() if isinstance(c, Training)}
        taken = in_turn(contenders, repeats, lambda of: f"{1e3 * of.seconds:.0f} ms a step")
        best = {key: min(found, key=lambda of: of.seconds) for key, found in taken.items()}
    ceiling = max(matmul_tflops(device, dtype, matmul_size) for dtype in (torch.bfloat16, torch.float32))
    peer = min((found.seconds for key, found in best.items() if "|peers" in key), default=None)
    rows = [row(key, batch_sizes[key.partition("|")[0]], of, ceiling, peer, peers_of) for key, of in best.items()]
    note = (
        f"Best of {repeats} x {steps} steps, taken in turn, after {WARM_UP} that do not count, with {torch.get_num_threads()} "
        f"threads; ours under Lightning's Trainer as `train.py` has it, batches of {batch_sizes}. FLOP are counted in a step "
        f"of the model, without the encoders; the ceiling is a matmul of {matmul_size} in the same run, in the faster of "
        f"bfloat16 and float32: {ceiling:.3g} TFLOP/s. "
        "Peers: the way of diffusers' LCM distillation script (images encoded each time, the teacher called twice, "
        "eager, unfused AdamW, the average tensor by tensor); the ratio is to the fastest of its precisions."
    )
    return Table("Training steps", rows, note)


def row(key: str, batch_size: int, of: Steps, ceiling: float, peer: float | None, peers_of: str) -> dict[str, Any]:
    share = partial(round, ndigits=1)
    experiment, _, way = key.partition("|")
    tflops = None if of.flop is None else of.flop / of.seconds / 1e12
    sheet = data_sheet_tflops()
    on_gpu = {
        "% of the data sheet": share(100 * tflops / sheet) if tflops and sheet else None,
        "peak GiB": share(of.peak_memory / 2**30) if of.peak_memory else None,
    }
    return {
        "training": experiment, "step": way.replace("_", " "), "ms a step": 1e3 * of.seconds,
        "images/s": batch_size / of.seconds,
        "images per CPU second": batch_size / of.cpu,
        "of the peers' rate": peer / of.seconds if peer is not None and experiment == peers_of else None,
        "GFLOP an image": None if of.flop is None else of.flop / batch_size / 1e9, "TFLOP/s": tflops,
        "% of a matmul": None if tflops is None else share(100 * tflops / ceiling),
        **(on_gpu if of.peak_memory else {}),
        "% waiting for data": None if of.waiting is None else share(100 * of.waiting / of.seconds),
        "% encoding": None if of.encoding is None else share(100 * of.encoding / of.seconds),
    }  # fmt: skip
