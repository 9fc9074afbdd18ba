"""The exponential moving average of a number that is logged step by step."""

import math


class ExponentialAverage:
    """The exponential moving average of finite numbers, bias-corrected.

    After n numbers it is sum(decay^(n-i) x_i) / sum(decay^(n-i)): what weighs is what was seen, not a start at zero.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.total = 0.0
        self.weight = 0.0

    def add(self, value: float) -> None:
        """Take one more number into account."""
        self.total = self.decay * self.total + value
        self.weight = self.decay * self.weight + 1

    @property
    def value(self) -> float:
        """The average; NaN of nothing."""
        return self.total / self.weight if self.weight else math.nan
