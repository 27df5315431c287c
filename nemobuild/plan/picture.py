"""A plan as a picture, in the terminal and as SVG: what fills each GPU, and throughput against concurrency."""

from __future__ import annotations

import math
from html import escape

from nemobuild.plan.memory import WEIGHTS, RankLedger
from nemobuild.plan.planner import Plan
from nemobuild.plan.report import decode, heading, outcome
from nemobuild.units import format_bytes

# Kind of line -> (letter in the terminal, colour); a line belongs to the first kind whose words its name contains.
_KINDS = (
    ("weights", (WEIGHTS,), "█", "#4a6d00"),
    ("KV cache", ("KV cache",), "▓", "#76b900"),
    ("working space", ("activations", "workspace", "logits", "RoPE"), "▒", "#5b8def"),
    ("CUDA, libraries", ("CUDA", "NCCL", "Python"), "░", "#8a8f98"),
    ("reserve, unused", ("reserve",), "·", "#dfe3e8"),
)
_TERMINAL_COLUMNS = 60


def terminal_picture(plan: Plan) -> str:
    """A bar for each stage's GPUs and one for each number of requests."""
    lines = []
    for rank in _stages(plan):
        label = "memory" if len(plan.shapes) < 2 else f"stage {rank.stage}"
        bar = "".join(letter * columns for letter, columns in _columns(rank))
        edge = _TERMINAL_COLUMNS - 1  # where the card ends, when more is needed than it has
        over = rank.total_bytes > rank.budget_bytes
        lines.append(f"{label:>9}  {bar}" + (f"  {format_bytes(rank.total_bytes)}" if over else ""))
        if over:
            at = round(edge * rank.budget_bytes / rank.total_bytes)
            lines.append(f"{'':>9}  {'':>{at}}^ the card ends here, {format_bytes(rank.budget_bytes)}")
    used = {kind for rank in _stages(plan) for kind, size in _sizes(rank) if size}
    legend = "  ".join(f"{letter} {kind}" for kind, _, letter, _ in _KINDS if kind in used)
    return "\n".join([*lines, f"{'':>9}  {legend}"])


def svg_picture(plan: Plan) -> str:
    """A standalone SVG: the ledger of every stage above, the ceilings of generation below."""
    parts, y = [], 84
    for rank in _stages(plan):
        parts += _svg_bar(plan, rank, y)
        y += 64
    parts.append(_svg_legend(plan, y))
    y += 36
    points = decode(plan) if plan.fits else []
    if len(points) > 1:
        parts.append(_svg_curve(plan, y))
        y += 300
    title, said = escape(heading(plan)), escape(outcome(plan))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{y}" viewBox="0 0 900 {y}" role="img" '
        f'font-family="sans-serif" font-size="12" fill="#444"><title>{title}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="20" y="28" font-size="14">{title}</text>'
        f'<text x="20" y="50" font-size="14">{said}</text>'
        f"{''.join(parts)}</svg>\n"
    )


def _stages(plan: Plan) -> list[RankLedger]:
    return list(plan.ranks[:: plan.profile.checkpoint.tensor_parallel])


def _sizes(rank: RankLedger) -> list[tuple[str, int]]:
    """Bytes of every kind, in the order of ``_KINDS``."""
    sizes = dict.fromkeys((kind for kind, *_ in _KINDS), 0)
    for line in rank.lines:
        sizes[next(kind for kind, words, *_ in _KINDS if any(word in line.name for word in words))] += line.bytes
    return list(sizes.items())


def _columns(rank: RankLedger) -> list[tuple[str, int]]:
    """Letters and their counts, so that the ends lie where they belong and the whole bar has its full length."""
    most, columns, at, done = max(rank.total_bytes, rank.budget_bytes), [], 0, 0
    for (_, size), (_, _, letter, _) in zip(_sizes(rank), _KINDS, strict=True):
        at += size
        end = round(_TERMINAL_COLUMNS * at / most)
        columns.append((letter, end - done))
        done = end
    return columns


def _svg_bar(plan: Plan, rank: RankLedger, y: int) -> list[str]:
    left, width = 20, 860
    most = max(rank.total_bytes, rank.budget_bytes)
    tp = plan.profile.checkpoint.tensor_parallel
    who = "memory" if plan.gpu is None else "each GPU" if len(plan.shapes) == 1 and tp > 1 else "GPU"
    if len(plan.shapes) > 1:
        who = f"stage {rank.stage}, blocks {rank.blocks.start} to {rank.blocks.stop - 1}"
    parts = [f'<text x="{left}" y="{y - 6}">{who}: {format_bytes(rank.budget_bytes)}</text>']
    x = float(left)
    for (kind, size), (_, _, _, colour) in zip(_sizes(rank), _KINDS, strict=True):
        wide = width * size / most
        text = escape(f"{kind}: {format_bytes(size)}")
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="30" fill="{colour}"><title>{text}</title></rect>'
        )
        if wide > 70:
            ink = "#fff" if kind == "weights" else "#222"
            parts.append(f'<text x="{x + 6:.1f}" y="{y + 20}" fill="{ink}">{format_bytes(size)}</text>')
        x += wide
    if rank.total_bytes > rank.budget_bytes:
        edge = left + width * rank.budget_bytes / most
        parts.append(
            f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="{y - 16}" y2="{y + 36}" stroke="#c00" stroke-width="2"/>'
            f'<text x="{edge - 6:.1f}" y="{y - 6}" fill="#c00" text-anchor="end">the card ends here</text>'
        )
    return parts


def _svg_legend(plan: Plan, y: int) -> str:
    """The kinds, with their sizes where there is one bar only."""
    sizes = {kind: f" {format_bytes(size)}" for kind, size in _sizes(plan.ranks[0])} if len(plan.shapes) < 2 else {}
    parts, x = [], 20
    for kind, _, _, colour in _KINDS:
        text = kind + sizes.get(kind, "")
        parts.append(f'<rect x="{x}" y="{y - 16}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="{y - 6}">{text}</text>')
        x += 7 * len(text) + 36
    return "".join(parts)


def _svg_curve(plan: Plan, top: int) -> str:
    """All requests together (left axis), and each of them (right axis), over requests on a logarithmic axis."""
    points, left, bottom, width, height = decode(plan), 80, top + 240, 740, 190
    most_all = _nice(max(p.tokens_per_s for p in points))
    most_one = _nice(max(p.tokens_per_s_per_request for p in points))
    span = math.log2(points[-1].requests)
    x = {p.requests: left + width * math.log2(p.requests) / span for p in points}
    parts = [
        f'<text x="20" y="{top + 14}" font-size="14">Ceilings of generation, '
        f"{plan.profile.limits.request_tokens:,} tokens a request (what bandwidth and arithmetic allow)</text>"
    ]
    for k in range(5):
        y = bottom - height * k / 4
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e6ea"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#4a6d00">{most_all * k / 4:,.0f}</text>'
            f'<text x="{left + width + 8}" y="{y + 4:.1f}" fill="#2f62c4">{most_one * k / 4:,.0f}</text>'
        )
    for p in points:
        parts.append(f'<text x="{x[p.requests]:.1f}" y="{bottom + 18}" text-anchor="middle">{p.requests}</text>')
    for values, most, colour in (
        ([p.tokens_per_s for p in points], most_all, "#76b900"),
        ([p.tokens_per_s_per_request for p in points], most_one, "#5b8def"),
    ):
        places = [(x[p.requests], bottom - height * v / most) for p, v in zip(points, values, strict=True)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"><title>{v:,.1f} tokens/s</title></circle>'
            for (a, b), v in zip(places, values, strict=True)
        ]
    parts.append(
        f'<text x="{left}" y="{top + 38}" fill="#4a6d00">tokens/s, all requests</text>'
        f'<text x="{left + width}" y="{top + 38}" text-anchor="end" fill="#2f62c4">tokens/s, each request</text>'
        f'<text x="{left + width / 2}" y="{bottom + 38}" text-anchor="middle">requests at once</text>'
    )
    return "".join(parts)


def _nice(value: float) -> float:
    """The next 1, 2, 4 or 8 times a power of ten: quarters of it are round."""
    scale: float = 10 ** math.floor(math.log10(value))
    return next(m * scale for m in (1, 2, 4, 8, 10) if m * scale >= value)
