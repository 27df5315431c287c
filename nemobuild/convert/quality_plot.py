"""Error by block as a picture: where FP8 costs, and whether it adds up.

Upper row: distance of the two residual streams after each block, as a share of the source's length. It may only grow
slowly; a jump names the block to look at. Lower row: the worst weight error of each block, which rounding alone keeps
near one level, and a mark where activations saturate.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nemobuild.convert.quality import QualityReport, QualityThresholds
from nemobuild.convert.verify_tensors import WeightError

_STEP, _LEFT, _TOP, _HEIGHT, _GAP = 12, 90, 50, 120, 50


def svg_errors(
    title: str, quality: QualityReport, weights: Sequence[WeightError], thresholds: QualityThresholds
) -> str:
    """A standalone SVG, 12 units a block, with a tooltip on every block."""
    count = len(quality.residual_error)
    worst = [0.0] * count
    for error in weights:
        block = int(error.group.split(".")[2])
        worst[block] = max(worst[block], error.error)
    saturated = [0.0] * count
    for activation in quality.activations:
        saturated[activation.block] = max(saturated[activation.block], activation.saturated_share)
    stream_top = max((e for e in quality.residual_error if e == e), default=0.0) * 1.1 or 1.0
    weight_top = max(*worst, thresholds.max_weight_error) * 1.1
    second = _TOP + _HEIGHT + _GAP
    points, shapes = [], []
    for i, (stream, weight, share) in enumerate(zip(quality.residual_error, worst, saturated, strict=True)):
        x = _LEFT + i * _STEP
        y = _TOP + _HEIGHT * (1 - (stream if stream == stream else stream_top) / stream_top)
        points.append(f"{x + _STEP / 2:.1f},{y:.1f}")
        bar = _HEIGHT * weight / weight_top
        lost = share > thresholds.max_saturated_share
        fill = "#d1495b" if lost or weight > thresholds.max_weight_error else "#76b900"
        what = f"block {i}: residual {stream:.2%}, weights {weight:.2%}, saturated {share:.2g}"
        shapes.append(
            f"<g><title>{escape(what)}</title>"
            f'<circle cx="{x + _STEP / 2:.1f}" cy="{y:.1f}" r="2.5" fill="#5b8def"/>'
            f'<rect x="{x}" y="{second + _HEIGHT - bar:.1f}" width="{_STEP - 2}" height="{bar:.1f}" fill="{fill}"/>'
            f'<rect x="{x}" y="{_TOP}" width="{_STEP}" height="{2 * _HEIGHT + _GAP}" fill="transparent"/></g>'
        )
        if i % 10 == 0:
            label = second + _HEIGHT + 16
            shapes.append(f'<text x="{x + _STEP / 2:.1f}" y="{label}" text-anchor="middle">{i}</text>')
    width = _LEFT + _STEP * count + 30
    bound = second + _HEIGHT * (1 - thresholds.max_weight_error / weight_top)
    total = quality.total
    head = f"{title}: divergence {total.divergence:.4f} nats, perplexity {total.perplexity_increase:+.2%}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 520)}" height="{second + _HEIGHT + 30}" '
        f'role="img" font-family="sans-serif" font-size="11" fill="#555"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="10" y="20" font-size="14">{escape(head)}</text>'
        f'<text x="10" y="{_TOP + 12}">residual</text><text x="10" y="{_TOP + 26}">{stream_top:.1%}</text>'
        f'<text x="10" y="{_TOP + _HEIGHT}">0</text>'
        f'<text x="10" y="{second + 12}">weights</text><text x="10" y="{second + 26}">{weight_top:.1%}</text>'
        f'<text x="10" y="{second + _HEIGHT}">0</text>'
        f'<polyline points="{" ".join(points)}" fill="none" stroke="#5b8def" stroke-width="1.5"/>{"".join(shapes)}'
        f'<line x1="{_LEFT}" x2="{width - 20}" y1="{bound:.1f}" y2="{bound:.1f}" stroke="#d1495b" '
        f'stroke-dasharray="4 3"/></svg>\n'
    )
