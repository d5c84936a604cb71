"""Line charts as plain numbers for the report's SVG: scaling, ticks, polylines. Draws nothing itself, knows no colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 460.0
HEIGHT: Final = 200.0
LEFT: Final = 52.0
RIGHT: Final = 8.0
TOP: Final = 10.0
BOTTOM: Final = 24.0
TICKS: Final = 4


@dataclass(frozen=True, slots=True)
class Series:
    """A named line; ``points`` are (x, y) in data units, y may be NaN (a gap)."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A series on the canvas: one polyline a stretch without gaps, and the last value as text."""

    name: str
    polylines: tuple[str, ...]
    dots: tuple[tuple[str, str], ...]
    last: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis at ``place`` of the canvas."""

    place: str
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything the template needs to draw one chart; all numbers are text already."""

    title: str
    about: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def chart(title: str, about: str, series: Sequence[Series]) -> Chart | None:
    """A chart of the series that have any finite point; None when none has."""
    kept = [one for one in series if any(math.isfinite(y) for _, y in one.points)]
    finite = [(x, y) for one in kept for x, y in one.points if math.isfinite(y)]
    if not finite:
        return None
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    y_ticks = ticks(min(y for _, y in finite), max(y for _, y in finite))
    frame = _Frame(x_low, x_high, y_ticks[0], y_ticks[-1])
    return Chart(
        title,
        about,
        tuple(_line(one, frame) for one in kept),
        tuple(Tick(_number(frame.x(x)), _label(x)) for x in _whole_ticks(x_low, x_high)),
        tuple(Tick(_number(frame.y(y)), _label(y)) for y in y_ticks),
    )


def ticks(low: float, high: float) -> list[float]:
    """Round values that enclose [low, high], at steps of 1, 2 or 5 times a power of ten."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = _round_step((high - low) / TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [count * step for count in range(first, last + 1)]


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next((factor * power for factor in (1.0, 2.0, 5.0) if raw <= factor * power * (1 + 1e-9)), 10.0 * power)


def _whole_ticks(low: float, high: float) -> list[float]:
    """Whole steps inside [low, high]."""
    step = max(1.0, _round_step(max(high - low, 1.0) / TICKS))
    return [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True, slots=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low) if self.x_high > self.x_low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.y_high - value) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _line(series: Series, frame: _Frame) -> Line:
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in series.points:
        if math.isfinite(y):
            stretches[-1].append((frame.x(x), frame.y(y)))
        elif stretches[-1]:
            stretches.append([])
    lines = tuple(" ".join(f"{_number(x)},{_number(y)}" for x, y in stretch) for stretch in stretches if len(stretch) > 1)
    dots = tuple((_number(stretch[0][0]), _number(stretch[0][1])) for stretch in stretches if len(stretch) == 1)
    last = next(y for _, y in reversed(series.points) if math.isfinite(y))
    return Line(series.name, lines, dots, _label(last))


def _number(value: float) -> str:
    return f"{value:.1f}"


def _label(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"
