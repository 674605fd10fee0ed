"""Which rank does a step wait for?"""

import json
import logging
import os
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist

from lcm.core.numbers import Positive

log = logging.getLogger(__name__)
Heartbeats = dict[int, tuple[int, str, float]]  # of a rank: how far it is, its host, when it said so


class Watchdog(L.Callback):
    """Names the ranks that have not arrived when a step, or a validation batch, takes longer than `timeout` seconds.

    A thread of every rank tells the store of the rendezvous how far the rank is; of a slow step the first rank that is not late
    says who is. It ends nothing: the process group's timeout, or SLURM, does.
    """

    def __init__(self, *, timeout: Positive) -> None:
        self.timeout = timeout
        self.place, self.moved = 0, time.monotonic()
        self.done = threading.Event()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.move()
        if trainer.world_size > 1:
            threading.Thread(target=self.watch, args=(trainer.global_rank, trainer.world_size), daemon=True).start()

    def move(self, *args: Any) -> None:
        self.place, self.moved = self.place + 1, time.monotonic()

    # Ranks wait for each other in the backward pass and in callbacks at the end of a batch.
    on_train_batch_start = on_before_backward = on_after_backward = on_train_batch_end = move  # type: ignore[assignment]
    on_validation_batch_start = on_validation_batch_end = move  # type: ignore[assignment]

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.done.set()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        self.done.set()

    def watch(self, rank: int, world_size: int) -> None:
        every, told = self.timeout / 5, 0
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(every, 1.0)))
        store = dist.PrefixStore("watchdog", client)
        while not self.done.wait(every):
            late = time.monotonic() - self.moved > self.timeout and told != self.place
            told = self.place if late else told
            try:
                store.set(str(rank), json.dumps([self.place, socket.gethostname(), time.time()]))
                if late:
                    known = [other for other in range(world_size) if store.check([str(other)])]
                    self.tell(rank, world_size, {other: json.loads(store.get(str(other))) for other in known})
            except dist.DistError:  # the store is in rank 0's process
                if late and rank == 1:
                    log.warning("watchdog: a step takes longer than %g s: rank 0 does not answer", self.timeout)

    def tell(self, rank: int, world_size: int, heartbeats: Heartbeats) -> None:
        """One line from the first rank that is not late itself."""
        farthest, now = max(place for place, _, _ in heartbeats.values()), time.time()
        late = {}
        for other in range(world_size):
            place, host, said = heartbeats.get(other, (0, "?", 0.0))
            if place < farthest or now - said > self.timeout / 2:
                late[other] = f"rank {other} on {host}" + (" (it does not answer)" if now - said > self.timeout / 2 else "")
        if rank == next((other for other in range(world_size) if other not in late), 0):
            waited = f"not arrived: {', '.join(late.values())}" if late else "all ranks are in it, so the network may hang"
            log.warning("watchdog: a step takes longer than %g s; %s", self.timeout, waited)
