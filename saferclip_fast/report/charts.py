"""Small SVG charts. Colors come from the page's style sheet, so that they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

Point = tuple[float, float]
Legend = list[tuple[str, str]]  # (class, text)

WIDTH, HEIGHT = 360, 240  # of a phone's screen, so that text keeps its size there
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38
HEAD = 6  # length of an arrow's head


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """Limits around the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    pad = (high - low) * share or abs(high) * share or 0.5
    return low - pad, high + pad


@dataclass
class Figure:
    """A chart with what stands around it."""

    title: str
    svg: Markup
    legend: Legend = field(default_factory=list)


@dataclass
class Group:
    """Figures under one heading, which share a legend."""

    title: str
    figures: list[Figure]
    legend: Legend = field(default_factory=list)


class Chart:
    """Marks on two linear axes. `kind` arguments are class names that page.css colors."""

    def __init__(
        self,
        description: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        x_label: str = "",
        y_label: str = "",
        x_ticks: Sequence[tuple[float, str]] | None = None,
        y_ticks: Sequence[tuple[float, str]] | None = None,
        height: int = HEIGHT,
    ) -> None:
        """
        Args:
            description: what a reader who cannot see it should know.
            x, y: limits.
            x_ticks, y_ticks: (place, text); round numbers where None.
        """
        self.description, self.x, self.y, self.height = description, x, y, height
        self.marks: list[Markup] = []
        self.axes: list[Markup] = []
        plain_x, plain_y = ([(v, f"{v:.6g}".replace("-", "−")) for v in nice_ticks(*limits)] for limits in (x, y))
        bottom = height - BOTTOM
        for value, text in plain_y if y_ticks is None else y_ticks:
            at = self._y(value)
            self._axis('<path class="grid" d="M{} {}H{}"/>', LEFT, at, WIDTH - RIGHT)
            self._axis('<text x="{}" y="{}" text-anchor="end">{}</text>', LEFT - 6, round(at + 4, 1), text)
        for value, text in plain_x if x_ticks is None else x_ticks:
            at = self._x(value)
            self._axis('<path class="grid" d="M{} {}v4"/>', at, bottom)
            self._axis('<text x="{}" y="{}" text-anchor="middle">{}</text>', at, bottom + 16, text)
        middle = (LEFT + WIDTH - RIGHT) / 2
        self._axis('<text x="{}" y="{}" text-anchor="middle">{}</text>', middle, height - 5, x_label)
        turned = '<text transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>'
        self._axis(turned, (TOP + bottom) / 2, y_label)

    def _x(self, value: float) -> float:
        low, high = self.x
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def _y(self, value: float) -> float:
        low, high = self.y
        bottom = self.height - BOTTOM
        return round(bottom - (value - low) / (high - low) * (bottom - TOP), 1)

    def _axis(self, markup: str, *values: object) -> None:
        self.axes.append(Markup(markup).format(*values))

    def _mark(self, markup: str, *values: object) -> None:
        self.marks.append(Markup(markup).format(*values))

    def _path(self, points: Iterable[Point]) -> str:
        return "L".join(f"{self._x(x)} {self._y(y)}" for x, y in points)

    def line(self, points: Sequence[Point], kind: str) -> None:
        self._mark('<path class="line {}" d="M{}"/>', kind, self._path(points))

    def band(self, points: Sequence[tuple[float, float, float]], kind: str) -> None:
        """The area between low and high of each (x, low, high)."""
        outline = [(x, high) for x, _, high in points] + [(x, low) for x, low, _ in reversed(points)]
        self._mark('<path class="band {}" d="M{}Z"/>', kind, self._path(outline))

    def arrow(self, start: Point, end: Point, kind: str) -> None:
        """From one point to another, with a head where it is long enough for one to be seen."""
        (a, b), (c, d) = ((self._x(x), self._y(y)) for x, y in (start, end))
        length = math.hypot(c - a, d - b)
        head = ""
        if length > HEAD:
            back = [((c - a) / length * HEAD, (d - b) / length * HEAD)] * 2
            ends = [(c - x - side * y / 2, d - y + side * x / 2) for (x, y), side in zip(back, (1, -1), strict=True)]
            head = f"M{ends[0][0]:.1f} {ends[0][1]:.1f}L{c} {d}L{ends[1][0]:.1f} {ends[1][1]:.1f}"
        self._mark('<path class="arrow {}" d="M{} {}L{} {}{}"/>', kind, a, b, c, d, head)

    def dots(self, points: Iterable[Point], kind: str) -> None:
        """One path of points; `kind` sets size and shape (round or square caps)."""
        self._mark('<path class="dots {}" d="{}"/>', kind, "".join(f"M{self._x(x)} {self._y(y)}h0" for x, y in points))

    def cross(self, x: tuple[float, float, float], y: tuple[float, float, float], kind: str, text: str = "") -> None:
        """A point (value, low, high) in both directions, and a word beside it."""
        (a, a_low, a_high), (b, b_low, b_high) = (tuple(map(self._x, x)), tuple(map(self._y, y)))
        self._mark('<path class="whisker {}" d="M{} {}H{}M{} {}V{}"/>', kind, a_low, b, a_high, a, b_low, b_high)
        self.dots([(x[0], y[0])], f"point {kind}")
        if text:
            self.word((x[0], y[0]), text)

    def word(self, point: Point, text: str) -> None:
        """Text beside a point, on the side where there is room."""
        x, y = self._x(point[0]), self._y(point[1])
        anchor, across = ("end", -7) if x > (LEFT + WIDTH) / 2 else ("start", 7)
        below = 15 if y < TOP + 20 else -7
        self._mark(
            '<text class="word" text-anchor="{}" x="{}" y="{}">{}</text>',
            *(anchor, round(x + across, 1), round(y + below, 1), text),
        )

    def svg(self) -> Markup:
        marks = Markup("").join(self.marks)
        return Markup(
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(self.description)}">'
            f'<g class="axes">{Markup("").join(self.axes)}</g><g class="marks">{marks}</g></svg>'
        )
