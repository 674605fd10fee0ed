"""Timers and tables of the benchmarks."""

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
from PIL import Image


@dataclass
class Table:
    """A table of a benchmark. rows: a dict for each row, all with the same keys. Numbers are shown with three digits.

    None is an empty cell. picture: saved beside the table.
    """

    title: str
    rows: list[dict[str, Any]]
    note: str
    picture: Image.Image | None = None

    def markdown(self) -> str:
        columns = list(self.rows[0])
        lines = [columns, ["---"] * len(columns), *([cell(row[name]) for name in columns] for row in self.rows)]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", self.note, ""])


def cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> dict[str, str]:
    """Return the names of the CPU and the GPU, the number of cores and the version of torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    names = [*names, platform.machine()]
    record = {"cpu": names[0], "cores": str(os.cpu_count()), "torch": torch.__version__}
    return {**record, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else record


def in_turn(
    contenders: Mapping[str, Callable[[], Any]], repeats: int, describe: Callable[[Any], str] = lambda result: ""
) -> dict[str, list[Any]]:
    """Return the results of each contender. Contenders take turns, so a disturbance of the machine affects all contenders.

    describe: returns the text of the progress line for a result.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, run in contenders.items():
            started = time.monotonic()
            results[name].append(result := run())
            seconds = time.monotonic() - started
            print(f"{turn + 1}/{repeats} {name}: {describe(result)} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return results


def now() -> float:
    """Return the time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory() -> int | None:
    """Return the peak of GPU memory in bytes; None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def reset_memory() -> None:
    """Free cached GPU memory and start a new peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Rate(NamedTuple):
    """Samples per second of wall-clock time, and per second of this process's CPU time."""

    wall: float
    cpu: float


def reading_rate(batch_sizes: Iterator[int], *, seconds: float, warm_up: int) -> Rate:
    """Measure an endless iterator over batch sizes for `seconds`, after its first `warm_up` batches."""
    for _ in range(warm_up):
        next(batch_sizes)
    started, cpu = time.perf_counter(), time.process_time()
    count = next(batch_sizes)
    while time.perf_counter() - started < seconds:
        count += next(batch_sizes)
    return Rate(count / (time.perf_counter() - started), count / (time.process_time() - cpu))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
