"""The blocks of a model as a picture: in the terminal and as SVG.

One column a block. The upper row is attention (full height: KV heads; a bar: linear; a dot: none), the lower row the
FFN, its height in proportion to the widest one. At a glance: where the KV cache is, and where the weights are.
"""

from __future__ import annotations

from collections import Counter
from html import escape

from nemobuild.model.spec import Attention, Linear, Mlp, ModelSpec, NoOp
from nemobuild.units import format_bytes, format_count

_LEVELS = "▁▂▃▄▅▆▇█"


def terminal_picture(spec: ModelSpec, columns: int = 80) -> str:
    """Rows of at most ``columns`` blocks with their indices."""
    widest = _widest(spec)
    attention = "".join(
        "·" if isinstance(b.attention, NoOp) else "─" if isinstance(b.attention, Linear) else "█" for b in spec.blocks
    )
    ffn = "".join(
        " " if isinstance(b.ffn, NoOp) else "─" if isinstance(b.ffn, Linear) else _LEVELS[_level(b.ffn.width, widest)]
        for b in spec.blocks
    )
    lines = []
    for begin in range(0, len(spec.blocks), columns):
        part = slice(begin, begin + columns)
        lines += [
            f"     block  {_ruler(begin, len(attention[part]))}",
            f" attention  {attention[part]}",
            f"       ffn  {ffn[part]}",
            "",
        ]
    return "\n".join(lines).rstrip()


def summary(spec: ModelSpec) -> list[tuple[str, str]]:
    """What to know of a model, as label and text."""
    kinds = Counter(type(b.attention).__name__ for b in spec.blocks)
    kv = Counter(b.attention.kv_heads for b in spec.blocks if isinstance(b.attention, Attention))
    widths = Counter(b.ffn.width for b in spec.blocks if isinstance(b.ffn, Mlp))
    ffn_kinds = Counter(type(b.ffn).__name__ for b in spec.blocks)
    uniform = max(spec.kv_heads_per_block, default=0) * len(spec.blocks)
    real = sum(spec.kv_heads_per_block)
    fp8, bf16 = (format_count(spec.kv_bytes_per_token(size)) for size in (1, 2))
    rows = [
        ("model type", spec.model_type),
        ("parameters", f"{format_count(spec.parameter_count)} in {len(spec.tensor_shapes())} tensors"),
        ("weights", f"{format_bytes(2 * spec.parameter_count)} in BF16"),
        (
            "blocks",
            f"{len(spec.blocks)}: attention {kinds['Attention']}, linear {kinds['Linear']}, none {kinds['NoOp']}",
        ),
        ("KV heads", ", ".join(f"{heads} in {count} blocks" for heads, count in sorted(kv.items())) or "none"),
        ("FFN", f"MLP {ffn_kinds['Mlp']}, linear {ffn_kinds['Linear']}, none {ffn_kinds['NoOp']}"),
        (
            "FFN widths",
            ", ".join(f"{width} x {count}" for width, count in sorted(widths.items(), reverse=True)) or "none",
        ),
        ("hidden, heads", f"{spec.hidden_size}, {spec.query_heads} query heads of {spec.head_size}"),
        ("vocabulary", f"{spec.vocab_size}" + (", tied embeddings" if spec.tied_embeddings else "")),
        ("context", f"{format_count(spec.max_context_tokens)} tokens"),
        ("KV cache", f"{fp8} / {bf16} bytes per token (FP8 / BF16)"),
    ]
    if real and uniform > real:
        rows.append(("", f"a sizer that takes all blocks for attention overstates it by {uniform / real - 1:.0%}"))
    return rows


def svg_picture(spec: ModelSpec, title: str) -> str:
    """A standalone SVG, 12 units a block, with a tooltip on every block."""
    widest, step, top, height = _widest(spec), 12, 40, 120
    width = step * len(spec.blocks) + 80
    shapes = []
    for i, block in enumerate(spec.blocks):
        x = 70 + i * step
        what = f"block {i}: attention {_attention_text(block.attention)}, FFN {_ffn_text(block.ffn)}"
        bars = []
        if isinstance(block.attention, Attention):
            bars.append((top, 30, "#76b900"))
        elif isinstance(block.attention, Linear):
            bars.append((top + 22, 8, "#5b8def"))
        if isinstance(block.ffn, Mlp):
            bar = max(2, round(height * block.ffn.width / widest))
            bars.append((top + 40 + height - bar, bar, "#8a8f98"))
        elif isinstance(block.ffn, Linear):
            bars.append((top + 32 + height, 8, "#5b8def"))
        drawn = "".join(f'<rect x="{x}" y="{y}" width="{step - 2}" height="{h}" fill="{fill}"/>' for y, h, fill in bars)
        hit = f'<rect x="{x}" y="{top}" width="{step}" height="{height + 40}" fill="transparent"/>'
        label = f'<text x="{x + 5}" y="{top + height + 56}" text-anchor="middle">{i}</text>' if i % 10 == 0 else ""
        shapes.append(f"<g><title>{escape(what)}</title>{drawn}{hit}</g>{label}")
    attention = f"{len(spec.attention_blocks)} of {len(spec.blocks)} blocks with attention"
    total = f"{spec.parameter_count / 1e9:.2f} B parameters, {attention}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + height + 70}" role="img" '
        f'font-family="sans-serif" font-size="11" fill="#555">'
        f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="10" y="20" font-size="14">{escape(title)}: {total}</text>'
        f'<text x="10" y="{top + 20}">attention</text><text x="10" y="{top + 40 + height - 4}">FFN</text>'
        f"{''.join(shapes)}</svg>\n"
    )


def as_json(spec: ModelSpec) -> dict[str, object]:
    return {
        "model_type": spec.model_type,
        "parameters": spec.parameter_count,
        "tensors": len(spec.tensor_shapes()),
        "kv_bytes_per_token": {"fp8": spec.kv_bytes_per_token(1), "bf16": spec.kv_bytes_per_token(2)},
        "max_context_tokens": spec.max_context_tokens,
        "blocks": [{"attention": _attention_text(b.attention), "ffn": _ffn_text(b.ffn)} for b in spec.blocks],
    }


def _attention_text(part: Attention | Linear | NoOp) -> str:
    return (
        f"{part.kv_heads} KV heads" if isinstance(part, Attention) else "linear" if isinstance(part, Linear) else "none"
    )


def _ffn_text(part: Mlp | Linear | NoOp) -> str:
    return f"width {part.width}" if isinstance(part, Mlp) else "linear" if isinstance(part, Linear) else "none"


def _widest(spec: ModelSpec) -> int:
    return max((b.ffn.width for b in spec.blocks if isinstance(b.ffn, Mlp)), default=1)


def _level(width: int, widest: int) -> int:
    return min(len(_LEVELS) - 1, width * len(_LEVELS) // (widest + 1))


def _ruler(begin: int, count: int) -> str:
    """Every tenth index, left-aligned over its column."""
    marks = [" "] * count
    for at in range(-begin % 10, count, 10):
        for k, letter in enumerate(str(begin + at)):
            if at + k < count:
                marks[at + k] = letter
    return "".join(marks)
