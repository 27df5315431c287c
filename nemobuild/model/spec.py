"""What a model of the family is, block by block, and nothing else.

The search that made these models left every block free to differ: attention may be real (with its own
number of KV heads), a single linear map, or absent; the same holds for the FFN, whose width varies. All
arithmetic on sizes starts here, per block; a formula that multiplies by the number of layers is a fault.

Standard library only: the CPU runtime inside the emitted repository carries this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention. ``kv_heads`` divides the model's query heads."""

    kv_heads: int


@dataclass(frozen=True, slots=True)
class Mlp:
    """Gated SiLU MLP of ``width`` intermediate channels."""

    width: int


@dataclass(frozen=True, slots=True)
class Linear:
    """One square map (hidden, hidden) in the place of attention or of the FFN."""


@dataclass(frozen=True, slots=True)
class NoOp:
    """The part does not exist: no norm, no weights, the residual passes through."""


@dataclass(frozen=True, slots=True)
class Block:
    attention: Attention | Linear | NoOp
    ffn: Mlp | Linear | NoOp


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """RoPE frequency scaling of Llama 3.1 and later (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder of the family. Token counts in tokens, widths in channels."""

    model_type: str
    hidden_size: int
    vocab_size: int
    query_heads: int
    head_size: int
    blocks: tuple[Block, ...]
    rope: Rope
    norm_epsilon: float
    max_context_tokens: int
    tied_embeddings: bool = False
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    end_token_ids: tuple[int, ...] = ()

    @property
    def query_width(self) -> int:
        """Rows of the query projection: query heads x head size."""
        return self.query_heads * self.head_size

    @property
    def attention_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that own a KV cache."""
        return tuple(i for i, b in enumerate(self.blocks) if isinstance(b.attention, Attention))

    @property
    def kv_heads_per_block(self) -> tuple[int, ...]:
        """KV heads of every block; 0 where there is no KV cache."""
        return tuple(b.attention.kv_heads if isinstance(b.attention, Attention) else 0 for b in self.blocks)

    @property
    def parameter_count(self) -> int:
        return sum(rows * (columns or 1) for _, (rows, columns) in self._shapes())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face tensor names of the model and their shapes, matrices as (out, in)."""
        return {name: (r,) if c is None else (r, c) for name, (r, c) in self._shapes()}

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """KV cache bytes for one token: sum over attention blocks of 2 x kv_heads x head_size x bytes."""
        return 2 * sum(self.kv_heads_per_block) * self.head_size * bytes_per_value

    def _shapes(self) -> Iterator[tuple[str, tuple[int, int | None]]]:
        hidden = self.hidden_size
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for i, block in enumerate(self.blocks):
            prefix = f"model.layers.{i}"
            if not isinstance(block.attention, NoOp):
                yield f"{prefix}.input_layernorm.weight", (hidden, None)
            if isinstance(block.attention, Attention):
                kv_width = block.attention.kv_heads * self.head_size
                yield f"{prefix}.self_attn.q_proj.weight", (self.query_width, hidden)
                yield f"{prefix}.self_attn.k_proj.weight", (kv_width, hidden)
                yield f"{prefix}.self_attn.v_proj.weight", (kv_width, hidden)
                yield f"{prefix}.self_attn.o_proj.weight", (hidden, self.query_width)
            elif isinstance(block.attention, Linear):
                yield f"{prefix}.self_attn.linear_attn.weight", (hidden, hidden)
            if not isinstance(block.ffn, NoOp):
                yield f"{prefix}.post_attention_layernorm.weight", (hidden, None)
            if isinstance(block.ffn, Mlp):
                yield f"{prefix}.mlp.gate_proj.weight", (block.ffn.width, hidden)
                yield f"{prefix}.mlp.up_proj.weight", (block.ffn.width, hidden)
                yield f"{prefix}.mlp.down_proj.weight", (hidden, block.ffn.width)
            elif isinstance(block.ffn, Linear):
                yield f"{prefix}.mlp.linear_mlp.weight", (hidden, hidden)
        yield "model.norm.weight", (hidden, None)
        if not self.tied_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)
