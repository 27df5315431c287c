"""A measurement as a standalone SVG: throughput and the two waits against load, one line for each endpoint and mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from nemobuild.bench.report import Cell

_COLOURS = ("#4a7d00", "#2f6fdb", "#b35900", "#8a3ffc")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 250, 170, 60, 70, 80
# Title, unit and the values of a panel: the solid line, and the dashed one if there is one.
_PANELS: tuple[tuple[str, tuple[Callable[[Cell], float | None], ...]], ...] = (
    ("tokens per second", (lambda c: c.tokens_per_s,)),
    (
        "ms to the first token, p50 and p99 (dashed)",
        (lambda c: _ms(c.first_token.p50), lambda c: _ms(c.first_token.p99)),
    ),
    ("ms per token, p50 and p99 (dashed)", (lambda c: _ms(c.inter_token.p50), lambda c: _ms(c.inter_token.p99))),
)
_LOADS = {"concurrency": "requests at once", "rate": "requests per second"}


def svg_picture(cells: Sequence[Cell]) -> str:
    """One row of panels for each kind of load."""
    lines = list(dict.fromkeys((cell.url, cell.reasoning) for cell in cells))
    colour = dict(zip(lines, (_COLOURS * len(lines))[: len(lines)], strict=True))
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    parts, y = [], _TOP + 18 * len(lines)
    for row, (url, mode) in enumerate(lines):
        at = 50 + 18 * row
        parts.append(f'<rect x="20" y="{at - 9}" width="24" height="4" fill="{colour[url, mode]}"/>')
        parts.append(f'<text x="52" y="{at - 2}">{escape(url)}, reasoning {mode}</text>')
    for kind in kinds:
        of_kind = [cell for cell in cells if cell.kind == kind]
        levels = sorted({cell.level for cell in of_kind})
        for column, (title, values) in enumerate(_PANELS):
            x = _LEFT + column * (_WIDTH + _GAP)
            top = max((v for cell in of_kind for value in values if (v := value(cell)) is not None), default=0) or 1.0
            parts += _frame(x, y, title, _LOADS[kind], levels, top := _round_up(top))
            for line in lines:
                points = [cell for cell in of_kind if (cell.url, cell.reasoning) == line]
                for value, dash in zip(values, ("", ' stroke-dasharray="5 4"'), strict=False):
                    path = [
                        (_x(x, cell.level, levels), y + _HEIGHT * (1 - v / top))
                        for cell in points
                        if (v := value(cell)) is not None
                    ]
                    parts.append(_line(path, colour[line], dash))
        y += _HEIGHT + 70
    width = _LEFT + len(_PANELS) * (_WIDTH + _GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" role="img" '
        f'font-family="sans-serif" font-size="12" fill="#444"><title>nemobuild bench</title>'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="20" y="26" font-size="15">nemobuild bench</text>'
        f"{''.join(parts)}</svg>\n"
    )


def _frame(x: int, y: int, title: str, below: str, levels: Sequence[float], top: float) -> list[str]:
    parts = [f'<text x="{x}" y="{y - 10}">{escape(title)}</text>']
    for step in range(5):
        at = y + _HEIGHT * (1 - step / 4)
        parts.append(f'<path d="M{x} {at:.1f}h{_WIDTH}" stroke="#{"999" if step == 0 else "e3e3e3"}"/>')
        parts.append(f'<text x="{x - 6}" y="{at + 4:.1f}" text-anchor="end">{top * step / 4:g}</text>')
    for level in levels:
        parts.append(
            f'<text x="{_x(x, level, levels):.1f}" y="{y + _HEIGHT + 18}" text-anchor="middle">{level:g}</text>'
        )
    parts.append(f'<text x="{x + _WIDTH / 2}" y="{y + _HEIGHT + 36}" text-anchor="middle">{below}</text>')
    return parts


def _line(points: Sequence[tuple[float, float]], colour: str, dash: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>{dots}'


def _x(left: int, level: float, levels: Sequence[float]) -> float:
    """Levels mostly double, so they stand at equal distances."""
    return left + _WIDTH * (levels.index(level) + 0.5) / len(levels)


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 or 10 times a power of ten: its quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if value <= step * power * 1.0000001)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
