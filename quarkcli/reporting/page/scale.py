"""Turns numbers into text, steps of a colour scale, and ticks of an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

STEPS = 10  # of the colour scale, as in the style sheet


def short(value: float | None) -> str:
    """Returns a number in three digits."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(value: float | None) -> str:
    """Returns bytes as people read them."""
    if value is None:
        return "–"
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {unit}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    """Returns a duration."""
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    whole = round(value)
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def count(value: float | None) -> str:
    """Returns a whole number."""
    return "–" if value is None else f"{value:,.0f}"


class Colours:
    """The steps of the colour scale for some values: even, or even in their logarithms where they span a decade."""

    def __init__(self, values: Iterable[float]) -> None:
        found = [value for value in values if math.isfinite(value)]
        self.low, self.high = min(found, default=0.0), max(found, default=0.0)
        self.logarithmic = self.low > 0 and self.high / self.low > 10

    def step(self, value: float) -> int:
        """Returns the step of a value, from 0 to `STEPS` - 1."""
        if self.high <= self.low:
            return STEPS // 2
        low, high, value = (self._of(number) for number in (self.low, self.high, value))
        return max(0, min(STEPS - 1, int((value - low) / (high - low) * STEPS)))

    def bounds(self) -> list[float]:
        """Returns where steps begin, and the end of the last one."""
        low, high = self._of(self.low), self._of(self.high)
        found = [low + (high - low) * step / STEPS for step in range(STEPS + 1)]
        return [math.exp(value) for value in found] if self.logarithmic else found

    def _of(self, value: float) -> float:
        return math.log(max(value, self.low)) if self.logarithmic else value


def nice(top: float) -> list[float]:
    """Returns the ticks of an axis from zero: round numbers, the last one not below `top`."""
    if top <= 0 or not math.isfinite(top):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top))
    for factor in (0.25, 0.5, 1.0, 2.0, 2.5, 5.0):
        step = factor * power
        ticks = math.ceil(top / step - 1e-9)
        if ticks <= 4:
            return [step * number for number in range(ticks + 1)]
    return [0.0, 10 * power]


def ticks(names: Sequence[str], most: int = 8) -> list[int]:
    """Returns which of some places get a name: evenly spaced, the first always."""
    step = max(1, math.ceil(len(names) / most))
    for nice_step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100):
        if nice_step >= step:
            step = nice_step
            break
    return list(range(0, len(names), step))
