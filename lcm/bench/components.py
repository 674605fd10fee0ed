"""Where the time of a distillation step goes: its parts one by one, each waited for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lcm.app.cli import build
from lcm.app.composition import compose
from lcm.app.inputs import pick_device
from lcm.bench.measure import Table, now, peak_memory
from lcm.core.ema import ema_update_
from lcm.core.random import generator
from lcm.models.flops import forward_flop, matmul_tflops
from lcm.modules.consistency import ConsistencyModule


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of one call that the device has finished, the fastest of `repeats` after one that does not count."""
    times = []
    for _ in range(1 + repeats):
        started, _ = now()
        run()
        times.append(now()[0] - started)
    return min(times[1:])


def measure(*, experiment: list[str], resolution: int, caption: str, repeats: int, matmul_size: int) -> Table:
    """experiment: overrides of `train.py` that compose a latent consistency distillation."""
    cfg, device = compose("train", experiment), pick_device("auto")
    module: ConsistencyModule = build(cfg.model)
    codec, batch_size = build(cfg.data.codec).to(device), cfg.data.batch_size
    module.to(device)
    if module.compile_networks:
        module.compile_all(torch.device(device))
    dtype = torch.bfloat16 if cfg.trainer.precision.startswith("bf16") else torch.float32
    teacher, net = module.frozen["teacher"].to(device, dtype), module.net
    target = net if module.target_net is None else module.target_net  # mu = 0: the student itself
    optimizer = module.optimization.make_optimizer(module.parameter_groups())
    autocast = partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)

    pixels = torch.zeros(batch_size, 3, resolution, resolution, dtype=torch.uint8, device=device)
    captions = [f"{caption}, number {i}" for i in range(batch_size)]
    batch = codec.encode({"x": pixels, "captions": captions, "keys": captions}, generator(device, "components"))
    drawn = module.objective.draw(batch.z0, generator(device, "draws"))
    t = torch.full((batch_size,), 500, device=device)
    both, tt = torch.cat([batch.z0, batch.z0]), torch.cat([t, t])
    cond = {name: torch.cat([part, batch.uncond[name].expand_as(part)]) for name, part in batch.cond.items()}

    def texts() -> None:
        codec.text.cache.clear()
        codec.text([*captions, ""])

    def call(unet: nn.Module, *args: Any) -> Tensor:
        w = drawn.w if unet is not teacher else None
        with autocast():
            return module.network(unet)(*args, w)

    def frozen(unet: nn.Module, *args: Any) -> None:
        with torch.no_grad():
            call(unet, *args)

    def objective() -> Tensor:
        with autocast():
            return module.objective.loss(module.denoisers(net), batch, drawn)[0]

    def update(loss: Tensor) -> None:
        loss.backward()
        clip()
        optimizer.step()
        if target is not net:
            ema_update_(target.parameters(), net.parameters(), module.ema_decay)
        optimizer.zero_grad(set_to_none=True)

    def clip() -> None:
        nn.utils.clip_grad_norm_(net.parameters(), module.optimization.clip_norm)

    one, encoding = (batch.z0, t, batch.cond), "before the step: "
    found = {
        f"{encoding}images (VAE)": seconds(lambda: codec.posterior(pixels), repeats),
        f"{encoding}captions (text encoder)": seconds(texts, repeats),
        "teacher, with and without caption": seconds(lambda: frozen(teacher, both, tt, cond), repeats),
        "target": seconds(lambda: frozen(target, *one), repeats),
        "student, forward": seconds(lambda: call(net, *one), repeats),
    }
    forward_backward = seconds(lambda: call(net, *one).float().square().mean().backward(), repeats)
    found["student, backward"] = forward_backward - found["student, forward"]
    networks = sum(list(found.values())[2:5])
    found["solver, consistency function, loss"] = seconds(objective, repeats) - networks
    objective().backward()
    found["clipping"] = seconds(clip, repeats)
    found["AdamW"] = seconds(optimizer.step, repeats)
    if target is not net:
        found["target's average"] = seconds(lambda: ema_update_(target.parameters(), net.parameters(), 0.95), repeats)
    whole = seconds(lambda: update(objective()), repeats)

    forward = forward_flop(module.family, net, batch.z0.shape, batch.cond)
    flop = {"teacher, with and without caption": 2, "target": 1, "student, forward": 1, "student, backward": 2}
    ceiling = matmul_tflops(device, dtype, matmul_size)
    rows = [
        row(name, time, whole, flop.get(name, 0) * forward, ceiling)
        for name, time in [*found.items(), ("the whole step", whole)]
    ]
    rows[-1] |= {"TFLOP/s": 6 * forward / whole / 1e12, "% of a matmul": round(100 * 6 * forward / whole / 1e12 / ceiling, 1)}
    note = (
        f"{batch_size} images of {resolution} px, {str(dtype).removeprefix('torch.')}, best of {repeats} each with "
        f"{torch.get_num_threads()} threads, after one that does not count; the backward and the solver's part are "
        f"differences. The ceiling is a matmul of {matmul_size} in the same run: {ceiling:.3g} TFLOP/s. One network call of "
        f"the batch has {forward / 1e9:.3g} GFLOP."
    )
    if peak := peak_memory():
        note += f" Peak memory: {peak / 2**30:.1f} GiB."
    return Table("Parts of a step", rows, note)


def row(name: str, time: float, whole: float, flop: float, ceiling: float) -> dict[str, Any]:
    tflops = flop / time / 1e12 if flop else None
    return {
        "part": name, "ms": 1e3 * time, "% of the step": round(100 * time / whole, 1), "TFLOP/s": tflops,
        "% of a matmul": None if tflops is None else round(100 * tflops / ceiling, 1),
    }  # fmt: skip
