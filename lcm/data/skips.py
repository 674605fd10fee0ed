"""How many samples a training skipped, and why."""

from collections import Counter
from typing import Any

from lcm.core.errors import UserError

ENOUGH = 1000  # samples seen before their share of skipped ones means something


class Skips:
    """Counts damaged samples by reason among those seen; more than `max_ratio` of them end the training."""

    def __init__(self, max_ratio: float) -> None:
        self.max_ratio, self.seen, self.by_reason = max_ratio, 0, Counter[str]()

    def add(self, seen: int, skipped: dict[str, int]) -> None:
        """Raises UserError above the limit."""
        self.seen += seen
        self.by_reason.update(skipped)
        if self.seen >= ENOUGH and self.by_reason.total() > self.max_ratio * self.seen:
            raise UserError(
                f"{self}, more than data.max_skip_ratio={self.max_ratio}: the warnings above name some of them; mend the "
                "shards, or raise it"
            )

    def __str__(self) -> str:
        return f"{self.by_reason.total()} of {self.seen} samples were damaged and skipped ({dict(self.by_reason)})"

    def metrics(self) -> dict[str, float]:
        return {f"data/skipped/{reason}": count for reason, count in self.by_reason.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "by_reason": dict(self.by_reason)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.by_reason = state["seen"], Counter(state["by_reason"])
