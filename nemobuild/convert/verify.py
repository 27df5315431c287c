"""Is a checkpoint what its source says? Names, dtypes, shapes, every byte, the config, and the logits.

This shares no rule with the converter. The converter thinks from target to source (pieces of a target tensor);
here each source tensor is walked in blocks of rows and looked up in all ranks by the table ``_PLACES``, and what no
source accounts for is reported as unexpected. The logits go through the reader and the forward pass of the CPU
runtime, so a fault in both tables would still show. Memory: a few row blocks, and one block of the model at a time.

Nothing is raised for a mismatch: all findings are collected, the worst first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemobuild.convert.verify_logits import logit_error, rounded_bits
from nemobuild.convert.workers import Progress, default_workers
from nemobuild.engine.cpu.checkpoint_config import CheckpointConfig, read_config
from nemobuild.errors import NemobuildError, UsageError
from nemobuild.model.spec import ModelSpec
from nemobuild.weights.safetensors import TensorInfo, read_header
from nemobuild.weights.snapshot import Snapshot

KINDS = ("config", "file", "missing", "unexpected", "dtype", "shape", "bytes", "logits")
"""Kinds of findings, worst first."""
LOGIT_TOLERANCE = 1e-3
ROW_BLOCK_BYTES = 4 << 20
_DEFAULT_PROMPT_TOKENS = (12, 5)

# Part of a block in Hugging Face's words -> tensor of the checkpoint and how the ranks share it.
_PLACES = {
    "input_layernorm": ("input_layernorm", "copy"),
    "self_attn.q_proj": ("attention.qkv", "q"),
    "self_attn.k_proj": ("attention.qkv", "k"),
    "self_attn.v_proj": ("attention.qkv", "v"),
    "self_attn.o_proj": ("attention.dense", "columns"),
    "self_attn.linear_attn": ("attention", "rows"),
    "post_attention_layernorm": ("post_layernorm", "copy"),
    "mlp.gate_proj": ("{ffn}.fc", "rows"),
    "mlp.up_proj": ("{ffn}.gate", "rows"),
    "mlp.down_proj": ("{ffn}.proj", "columns"),
    "mlp.linear_mlp": ("{ffn}", "rows"),
}
_SPEC_FIELDS = (
    *("hidden_size", "vocab_size", "query_heads", "head_size", "rope", "norm_epsilon", "max_context_tokens"),
    "blocks",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: its kind, where (file, tensor or key), and a sentence."""

    kind: str
    where: str
    what: str
    extent: float = 0.0


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Findings, worst first. ``max_logit_error`` is None when no logits could be or should be computed."""

    checkpoint: Path
    findings: tuple[Finding, ...]
    tensors: int
    compared_bytes: int
    prompt_tokens: int
    max_logit_error: float | None
    elapsed_s: float

    @property
    def passed(self) -> bool:
        return not self.findings


@dataclass(frozen=True, slots=True)
class _Place:
    """Rows x columns of a source tensor, to be found from row ``at`` on in a tensor of the checkpoint."""

    rank: int
    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    at: int


def verify(
    checkpoint: Path,
    against: Snapshot,
    prompts: list[list[int]] | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """Compare the checkpoint folder with its source.

    ``prompts`` are token ids; None takes two short ones, an empty list leaves the logits out. Sources wider than BF16
    are rounded before they are compared. ``progress`` is called once per source tensor.
    Raises ``UsageError`` for a bad prompt or a path that is not a folder; all else is a finding.
    """
    started_s = time.monotonic()
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise UsageError("bad-path", f"{checkpoint} is not a folder.", next="Give the folder of the checkpoint.")
    if prompts is None:
        prompts = default_prompts(against.spec)
    _check_prompts(prompts, against.spec)
    findings: list[Finding] = []
    compared_bytes, tensors, max_logit_error = 0, 0, None
    config = _compare_config(checkpoint, against.spec, findings)
    if config is not None:
        ranks = _read_headers(checkpoint, config, findings)
        tensors = sum(map(len, ranks))
        compared_bytes = _compare_tensors(config, ranks, against, findings, workers, progress, started_s)
        if prompts and all(f.kind == "bytes" for f in findings):
            max_logit_error = _compare_logits(checkpoint, against, prompts, findings)
    findings.sort(key=lambda f: (KINDS.index(f.kind), -f.extent))
    return VerifyReport(
        checkpoint=checkpoint,
        findings=tuple(findings),
        tensors=tensors,
        compared_bytes=compared_bytes,
        prompt_tokens=sum(map(len, prompts)),
        max_logit_error=max_logit_error,
        elapsed_s=time.monotonic() - started_s,
    )


def default_prompts(spec: ModelSpec) -> list[list[int]]:
    """Two prompts of token ids spread over the vocabulary, the same for every run."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, spec.vocab_size, count).tolist() for count in _DEFAULT_PROMPT_TOKENS]


def _check_prompts(prompts: Sequence[Sequence[int]], spec: ModelSpec) -> None:
    for prompt in prompts:
        if not prompt or not all(0 <= token < spec.vocab_size for token in prompt):
            raise UsageError(
                "bad-prompt",
                f"{str(prompt)[:80]} is not a list of token ids below {spec.vocab_size}.",
                next="Give at least one token id of the model's vocabulary.",
            )


def _compare_config(checkpoint: Path, spec: ModelSpec, findings: list[Finding]) -> CheckpointConfig | None:
    """Compare ``config.json``; None when the rest cannot be read by it."""
    try:
        config, found = read_config(checkpoint)
    except NemobuildError as error:
        findings.append(Finding("config", "config.json", str(error)))
        return None
    if found.dtype != "bfloat16":
        findings.append(Finding("config", "config.json: dtype", f"It is {found.dtype}, not bfloat16."))
    for name in _SPEC_FIELDS:
        ours, theirs = getattr(found, name), getattr(spec, name)
        where = f"config.json: {name}"
        if name == "blocks" and len(ours) == len(theirs):
            for i, (mine, source) in enumerate(zip(ours, theirs, strict=True)):
                if mine != source:
                    findings.append(Finding("config", f"{where}[{i}]", f"It is {mine}; the source has {source}."))
        elif ours != theirs:
            findings.append(Finding("config", where, f"It is {str(ours)[:200]}; the source has {str(theirs)[:200]}."))
    # Tensors can only be looked up by a config that describes the same blocks.
    same = (
        found.blocks == spec.blocks and found.hidden_size == spec.hidden_size and found.query_heads == spec.query_heads
    )
    return config if same and found.head_size == spec.head_size and found.vocab_size == spec.vocab_size else None


def _read_headers(checkpoint: Path, config: CheckpointConfig, findings: list[Finding]) -> list[dict[str, TensorInfo]]:
    """Tensors of every rank; an unreadable file is a finding and has none."""
    ranks: list[dict[str, TensorInfo]] = []
    files = [f"rank{n}.safetensors" for n in range(config.tp * config.pp)]
    for file in files:
        try:
            ranks.append(read_header(checkpoint / file))
        except NemobuildError as error:
            findings.append(Finding("file", file, str(error)))
            ranks.append({})
    for path in sorted(checkpoint.glob("*.safetensors")):
        if path.name not in files:
            findings.append(Finding("file", path.name, f"config.json speaks of {len(files)} ranks only."))
    return ranks


def _compare_tensors(
    config: CheckpointConfig,
    ranks: list[dict[str, TensorInfo]],
    against: Snapshot,
    findings: list[Finding],
    workers: int | None,
    progress: Callable[[Progress], None] | None,
    started_s: float,
) -> int:
    """Compare all tensors; gives the checkpoint bytes that were compared."""
    broken = {
        n for n, rank in enumerate(ranks) if not rank and any(f.where == f"rank{n}.safetensors" for f in findings)
    }
    wanted: dict[tuple[int, str], tuple[int, ...]] = {}
    uses: dict[str, list[_Place]] = {name: [] for name in against.tensors}
    for source, place, shape in _places(config, against.spec, ranks):
        uses[source].append(place)
        wanted[place.rank, place.name] = shape
    usable = set()
    for (rank, name), shape in wanted.items():
        where, info = f"rank{rank}: {name}", ranks[rank].get(name)
        if info is None:
            if rank not in broken:
                findings.append(Finding("missing", where, "The tensor is not there."))
        elif info.dtype != "BF16":
            findings.append(Finding("dtype", where, f"It is {info.dtype}, not BF16."))
        elif info.shape != shape:
            findings.append(Finding("shape", where, f"It has shape {info.shape}; the source implies {shape}."))
        else:
            usable.add((rank, name))
    for n, rank_tensors in enumerate(ranks):
        for name in rank_tensors:
            if (n, name) not in wanted:
                findings.append(Finding("unexpected", f"rank{n}: {name}", "Nothing in the source accounts for it."))

    def compare(name: str) -> list[Finding]:
        places = [p for p in uses[name] if (p.rank, p.name) in usable]
        return list(_compare_source(against.tensors[name], places, ranks))

    done_bytes = 0
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        for name, found in zip(uses, pool.map(compare, uses), strict=True):
            findings += found
            done_bytes += against.tensors[name].nbytes
            if progress is not None:
                elapsed_s = time.monotonic() - started_s
                progress(Progress(done_bytes, against.weight_bytes, 0, elapsed_s, name))
    findings += _compare_padding(config, ranks, against.spec, usable)
    return sum(ranks[rank][name].nbytes for rank, name in usable)


def _places(
    config: CheckpointConfig, spec: ModelSpec, ranks: list[dict[str, TensorInfo]]
) -> Iterator[tuple[str, _Place, tuple[int, ...]]]:
    """For every source tensor and every rank that holds of it: where, and the shape of the tensor there."""
    tp, shapes = config.tp, spec.tensor_shapes()
    stage_of = {layer: stage for stage, layers in enumerate(config.stages) for layer in layers}
    vocab, hidden, padded = spec.vocab_size, spec.hidden_size, -(-spec.vocab_size // tp)
    for source, shape in shapes.items():
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        if not source.startswith("model.layers."):
            continue
        _, _, number, part = source.removesuffix(".weight").split(".", 3)
        layer = int(number)
        stage = stage_of[layer]
        name, rule = _PLACES[part]
        name = name.replace("{ffn}", config.ffn_name)
        name = f"transformer.layers.{layer - config.stages[stage].start}.{name}.weight"
        for t in range(tp):
            rank = stage * tp + t
            if rule == "copy":
                yield source, _Place(rank, name, (0, rows), (0, columns), 0), shape
            elif rule == "rows":
                share = rows // tp
                yield source, _Place(rank, name, (t * share, (t + 1) * share), (0, columns), 0), (share, columns)
            elif rule == "columns":
                share = columns // tp
                yield source, _Place(rank, name, (0, rows), (t * share, (t + 1) * share), 0), (rows, share)
            else:
                query_rows, size = spec.query_width // tp, spec.head_size
                kv_heads = spec.kv_heads_per_block[layer]
                # One head at least on every rank, so with more ranks than heads neighbours hold the same one.
                kv_rows = max(kv_heads // tp, 1) * size
                start = t * query_rows if rule == "q" else t * kv_heads // tp * size
                count = query_rows if rule == "q" else kv_rows
                at = {"q": 0, "k": query_rows, "v": query_rows + kv_rows}[rule]
                whole = (query_rows + 2 * kv_rows, columns)
                yield source, _Place(rank, name, (start, start + count), (0, columns), at), whole
    last = (config.pp - 1) * tp
    head = "model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"
    for t in range(tp):
        embedding = _Place(t, "transformer.vocab_embedding.weight", (0, vocab), (0, hidden), 0)
        yield "model.embed_tokens.weight", embedding, (vocab, hidden)
        yield "model.norm.weight", _Place(last + t, "transformer.ln_f.weight", (0, 1), (0, hidden), 0), (hidden,)
        # Tied weights may be left out: TensorRT-LLM then takes the embedding.
        if not spec.tied_embeddings or "lm_head.weight" in ranks[last + t]:
            rows_there = (min(t * padded, vocab), min((t + 1) * padded, vocab))
            yield head, _Place(last + t, "lm_head.weight", rows_there, (0, hidden), 0), (padded, hidden)


def _compare_source(source: TensorInfo, places: list[_Place], ranks: list[dict[str, TensorInfo]]) -> Iterator[Finding]:
    """Walk a source tensor once, by blocks of rows, and compare each with all its places."""
    rows, columns = source.shape if len(source.shape) == 2 else (1, source.shape[0])
    step = max(1, ROW_BLOCK_BYTES * rows // max(1, source.nbytes))
    wrong = [0] * len(places)
    first: list[str] = [""] * len(places)
    for start in range(0, rows if places else 0, step):
        end = min(start + step, rows)
        block = rounded_bits(source, (start, end)).reshape(end - start, columns)
        for i, place in enumerate(places):
            r0, r1 = max(start, place.rows[0]), min(end, place.rows[1])
            if r0 >= r1:
                continue
            at = place.at + r0 - place.rows[0]
            info = ranks[place.rank][place.name]
            found = rounded_bits(info, (at, at + r1 - r0)).reshape(r1 - r0, -1)
            differs = found != block[r0 - start : r1 - start, place.columns[0] : place.columns[1]]
            count = int(np.count_nonzero(differs))
            if count and not wrong[i]:
                row, column = np.argwhere(differs)[0]
                first[i] = f"[{at + row}, {column}]" if len(info.shape) == 2 else f"[{column}]"
            wrong[i] += count
    for place, count, where in zip(places, wrong, first, strict=True):
        if count:
            size = (place.rows[1] - place.rows[0]) * (place.columns[1] - place.columns[0])
            what = f"{count:,} of {size:,} values differ from {source.name}, first at {where}."
            yield Finding("bytes", f"rank{place.rank}: {place.name}", what, count / size)


def _compare_padding(
    config: CheckpointConfig, ranks: list[dict[str, TensorInfo]], spec: ModelSpec, usable: set[tuple[int, str]]
) -> Iterator[Finding]:
    """Rows beyond the vocabulary must be zero."""
    name = "lm_head.weight"
    for t in range(config.tp):
        rank = (config.pp - 1) * config.tp + t
        if (rank, name) in usable:
            info = ranks[rank][name]
            held = min(max(spec.vocab_size - t * info.shape[0], 0), info.shape[0])
            if rounded_bits(info, (held, info.shape[0])).any():
                yield Finding("bytes", f"rank{rank}: {name}", "Rows beyond the vocabulary are not zero.")


def _compare_logits(
    checkpoint: Path, against: Snapshot, prompts: list[list[int]], findings: list[Finding]
) -> float | None:
    try:
        error = logit_error(checkpoint, against, prompts)
    except NemobuildError as refusal:
        findings.append(Finding("logits", "forward pass", str(refusal)))
        return None
    # NaN is not within any tolerance.
    if not error <= LOGIT_TOLERANCE:
        what = f"Logits differ by up to {error:.3g} (allowed: {LOGIT_TOLERANCE:g})."
        findings.append(Finding("logits", "forward pass", what, error))
    return error
