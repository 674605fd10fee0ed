"""How everything here is measured, and the tables that hold it."""

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Table:
    """rows: one dict a row, with the same keys; numbers are shown with three digits, None as an empty cell."""

    title: str
    rows: list[dict[str, Any]]
    note: str

    def markdown(self) -> str:
        head = list(self.rows[0])
        lines = [head, ["---"] * len(head), *([shown(row[name]) for name in head] for row in self.rows)]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", self.note, ""])


def shown(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> dict[str, str]:
    """What the figures hold for."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts = {"cpu": names[0] if names else platform.machine(), "cores": str(os.cpu_count()), "torch": torch.__version__}
    return {**facts, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else facts


DATA_SHEET = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}  # dense bfloat16 TFLOP/s, SXM where there is


def data_sheet_tflops() -> float | None:
    """What the GPU's vendor says of dense bfloat16 matmuls, if it is a known one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((float(tflops) for known, tflops in DATA_SHEET.items() if known in name), None)


def in_turn(
    contenders: Mapping[str, Callable[[], Any]], repeats: int, say: Callable[[Any], str] = lambda result: ""
) -> dict[str, list[Any]]:
    """Each contender's results; they take turns, so that what disturbs the machine for a while disturbs them all.

    say: of a result, for the line that tells how far the measurement is: what is measured is not lost with what comes after.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, run in contenders.items():
            started = time.monotonic()
            results[name].append(result := run())
            took = f"{time.monotonic() - started:.0f} s"
            print(f"{turn + 1}/{repeats} {name}: {say(result)} ({took})", file=sys.stderr, flush=True)
    return results


def now() -> tuple[float, float]:
    """The clock's seconds, and this process's, when the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def peak_memory() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def released() -> None:
    """Let the next contender have the GPU's memory, and its own peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def elapsed(start: tuple[float, float], end: tuple[float, float], steps: int) -> tuple[float, float]:
    return (end[0] - start[0]) / steps, (end[1] - start[1]) / steps


class Rate(NamedTuple):
    """Samples a second by the clock, and a second of this process's processor time."""

    wall: float
    cpu: float


def reading_rate(batches: Iterator[int], *, seconds: float, warm_up: int) -> Rate:
    """Of an iterator over batch sizes, without its first `warm_up` batches."""
    for _ in range(warm_up):
        next(batches)
    started, cpu = time.perf_counter(), time.process_time()
    count = next(batches)
    while time.perf_counter() - started < seconds:
        count += next(batches)
    return Rate(count / (time.perf_counter() - started), count / (time.process_time() - cpu))


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def resident_mb(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE / 1e6


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
