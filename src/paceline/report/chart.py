"""A chart of values over steps, as inline SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 12, 30
_MAX_POINTS = 800
_MAX_TICKS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """Values over steps.

    Attributes:
        label: for the legend; empty where the chart's title says it.
        points: (step, value) in order of steps.
        has_dots: whether each point is shown, as few measurements are.
    """

    label: str
    points: Sequence[Point]
    has_dots: bool = False


@dataclass(frozen=True, slots=True)
class Marks:
    """What happened at steps that all charts show.

    Attributes:
        saves: steps that were saved.
        resumptions: first steps of resumptions.
    """

    saves: Sequence[int] = ()
    resumptions: Sequence[int] = ()


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    marks: Marks,
    write: Callable[[float], str] = "{:g}".format,
    limit: float | None = None,
    is_from_zero: bool = False,
) -> str:
    """A chart with its title and legend.

    Args:
        title: with the unit.
        lines: values that are not finite are left out.
        marks: vertical lines and ticks.
        write: a value of the vertical axis in words.
        limit: a bound that is drawn if it is in sight of the values.
        is_from_zero: whether the axis starts at 0, if no value is below.
    """
    lines = [Line(line.label, thinned(_finite(line.points)), line.has_dots) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    shown_limit = limit if limit and limit <= 3 * max(value for _, value in points) else None
    scale = _Scale.around(points, shown_limit, is_from_zero=is_from_zero)
    drawing = [
        *_grid(scale, write),
        *_marks(scale, marks),
        *(part for number, line in enumerate(lines) for part in _line(scale, line, number)),
    ]
    if shown_limit is not None:
        y = scale.y(shown_limit)
        drawing.append(f'<path class="limit" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
    legend = "".join(
        f'<span class="key line{number}">{escape(line.label)}</span>'
        for number, line in enumerate(lines)
        if line.label
    )
    return (
        f"<figure><figcaption>{escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawing)}</svg></figure>"
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """From steps and values to places in the picture."""

    first: float
    last: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Sequence[Point], limit: float | None, *, is_from_zero: bool) -> _Scale:
        steps, values = [step for step, _ in points], [value for _, value in points]
        values += [] if limit is None else [limit]
        low, high = min(values), max(values)
        if is_from_zero and low >= 0:
            return cls(min(steps), max(max(steps), min(steps) + 1), 0.0, 1.06 * high or 1.0)
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        low -= margin
        return cls(min(steps), max(max(steps), min(steps) + 1), low, high + margin)

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _grid(scale: _Scale, write: Callable[[float], str]) -> Iterator[str]:
    floor = _HEIGHT - _BOTTOM
    for value in ticks(scale.low, scale.high):
        y = scale.y(value)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text class="y" x="{_LEFT - 8}" y="{y + 4:.1f}">{escape(write(value))}</text>'
    for step in ticks(scale.first, scale.last):
        if step == round(step):
            yield f'<text class="x" x="{scale.x(step):.1f}" y="{floor + 20}">{step:,.0f}</text>'


def _marks(scale: _Scale, marks: Marks) -> Iterator[str]:
    floor = _HEIGHT - _BOTTOM
    for step in marks.saves:
        if scale.first <= step <= scale.last:
            title = f"<title>saved after step {step}</title>"
            yield f'<path class="save" d="M{scale.x(step):.1f} {floor}v6">{title}</path>'
    for step in marks.resumptions:
        if scale.first <= step <= scale.last:
            title = f"<title>resumed at step {step}</title>"
            yield f'<path class="resumed" d="M{scale.x(step):.1f} {floor}V{_TOP}">{title}</path>'


def _line(scale: _Scale, line: Line, number: int) -> Iterator[str]:
    places = " ".join(f"{scale.x(step):.1f},{scale.y(value):.1f}" for step, value in line.points)
    yield f'<polyline class="line{number}" points="{places}"/>'
    for step, value in line.points if line.has_dots or len(line.points) == 1 else ():
        title = f"<title>step {step:g}: {value:.6g}</title>"
        place = f'cx="{scale.x(step):.1f}" cy="{scale.y(value):.1f}"'
        yield f'<circle class="line{number}" {place} r="3">{title}</circle>'


def ticks(low: float, high: float) -> list[float]:
    """At most a few round numbers from `low` to `high`, evenly spaced."""
    rough = (high - low) / _MAX_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * 0.999)
    first = math.ceil(low / spacing - 1e-9)
    count = math.floor(high / spacing + 1e-9) - first + 1
    return [(first + number) * spacing for number in range(count)]


def thinned(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """The points, or of each stretch of them the least and the greatest, so that spikes stay."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(step, value) for step, value in points if math.isfinite(value)]
