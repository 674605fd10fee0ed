"""Annotations for the valid range of a numeric argument. `lcm.app.arguments` checks a configuration against them."""

import math
from typing import Annotated, Any, Literal, NamedTuple


class Limit(NamedTuple):
    """The range `low` to `high`. above: exclude `low` itself."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def holds(self, value: Any) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f" {'above' if self.above else 'from'} {self.low:g}"
        return low + ("" if self.high == math.inf else f" to {int(self.high)}")


Count = Annotated[int, Limit(1)]
Whole = Annotated[int, Limit(0)]
Seed = Annotated[int, Limit(0, 2**32 - 1)]
Positive = Annotated[float, Limit(0, above=True)]
NonNegative = Annotated[float, Limit(0)]
Share = Annotated[float, Limit(0, 1)]
PositiveShare = Annotated[float, Limit(0, 1, above=True)]
SkipSteps = Annotated[int, Limit(1, 1000)]
Dtype = Literal["float32", "bfloat16", "float16"]
Engine = Literal["torch", "openvino"]
