"""Samples that a scan leaves out: a log of the first ones, and their counts for the metrics of a training."""

import logging
from collections import Counter
from collections.abc import Mapping

from lcm.data import growing
from lcm.data.samples import advice

log = logging.getLogger(__name__)
NAMED = 10  # samples that the log names for each reason


class LeftOutLog:
    """Logs the first `NAMED` samples that are left out for each reason."""

    def __init__(self) -> None:
        self.count = Counter[str]()

    def add(self, reason: str, key: str, title: str) -> None:
        self.count[reason] += 1
        if self.count[reason] <= NAMED:
            hint = advice({reason: 1}) if self.count[reason] == 1 else ""
            log.warning("leaving out sample %s of %s: %s%s", key, title, reason, hint)
        elif self.count[reason] == NAMED + 1:
            log.warning("leaving out more samples for the same reason, which are counted but not named: %s", reason)


left_out_log = LeftOutLog()
unreported: Counter[str] = Counter()  # samples that the scans of this process left out since the last batch


def add_left_out(counts: Mapping[str, int]) -> None:
    """Add the counts by reason of a scan, which runs in a thread."""
    with growing.starting:
        unreported.update(counts)


def take_left_out() -> dict[str, int]:
    """Return the counts by reason of left-out samples since the last call."""
    with growing.starting:
        counts = dict(unreported)
        unreported.clear()
    return counts
