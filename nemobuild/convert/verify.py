"""Is a checkpoint what its source says, and good enough? Names, dtypes, shapes, scales, every value, config, quality.

This shares no rule with the converter (``verify_places``). In a BF16 checkpoint every byte and every logit must be that
of the source; in an FP8 one every weight within half a step of E4M3, and the model as a whole within thresholds on
held-out text (``quality``). The forward pass goes through the reader of the CPU runtime, so a fault in both tables
would still show. Memory: a few row blocks, and one block of each model at a time.

Nothing is raised for a mismatch: all findings are collected, the worst first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemobuild.convert.quality import HeldOutText, QualityReport, QualityThresholds, check_texts, measure_quality
from nemobuild.convert.verify_models import StreamedModel, hf_model, hf_tensors, logit_error, trtllm_model
from nemobuild.convert.verify_places import Layout, Place, hf_layout, trtllm_layout
from nemobuild.convert.verify_tensors import (
    Difference,
    Source,
    WeightError,
    check_scales,
    compare_source,
    dirty_padding,
    weight_errors,
)
from nemobuild.convert.workers import Progress, default_workers
from nemobuild.engine.cpu.checkpoint_config import CheckpointConfig, read_config
from nemobuild.errors import NemobuildError, UsageError
from nemobuild.model.hf_config import load_json, spec_from_config
from nemobuild.model.spec import ModelSpec
from nemobuild.weights.quantized import FLOAT8
from nemobuild.weights.safetensors import TensorInfo, read_header
from nemobuild.weights.snapshot import Snapshot

KINDS = tuple("config file missing unexpected dtype shape scale bytes weights logits quality activations".split())
"""Kinds of findings, worst first."""
LOGIT_TOLERANCE = 1e-3
_DEFAULT_PROMPT_TOKENS = (12, 5)
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
    """Findings, worst first, and the numbers behind them.

    ``max_logit_error`` is None for FP8, and when no logits could be or should be computed. ``weights`` (FP8 only, the
    worst first) and ``quality`` (with held-out texts only) say what FP8 costs.
    """

    checkpoint: Path
    precision: str
    findings: tuple[Finding, ...]
    tensors: int
    compared_bytes: int
    prompt_tokens: int
    max_logit_error: float | None
    weights: tuple[WeightError, ...]
    quality: QualityReport | None
    elapsed_s: float

    @property
    def passed(self) -> bool:
        return not self.findings


@dataclass(frozen=True, slots=True)
class _Opened:
    """A checkpoint whose config was read. ``config`` is None for a Hugging Face folder."""

    layout: Layout
    config: CheckpointConfig | None
    broken: frozenset[int]

    @property
    def fp8(self) -> bool:
        return any(place.scale for _, place in self.layout.places)


def verify(
    checkpoint: Path,
    against: Snapshot,
    prompts: list[list[int]] | None = None,
    *,
    texts: Sequence[HeldOutText] = (),
    thresholds: QualityThresholds | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    block_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare a checkpoint folder (TensorRT-LLM's or Hugging Face's form) with its source.

    ``prompts`` are token ids, for BF16; None takes two short ones, an empty list leaves the logits out. Sources wider
    than BF16 are rounded before they are compared. ``texts`` are what the quality of an FP8 checkpoint is measured on,
    against ``thresholds``. ``progress`` is called once per source tensor, ``block_progress`` once per block of a
    measurement. Raises ``UsageError`` for a bad prompt, text or path; all else is a finding.
    """
    started_s = time.monotonic()
    checkpoint, thresholds = Path(checkpoint), thresholds or QualityThresholds()
    if not checkpoint.is_dir():
        raise UsageError("bad-path", f"{checkpoint} is not a folder.", next="Give the folder of the checkpoint.")
    if prompts is None:
        prompts = default_prompts(against.spec)
    _check_prompts(prompts, against.spec)
    check_texts(texts, against.spec.vocab_size)
    findings: list[Finding] = []
    compared_bytes, tensors, max_logit_error = 0, 0, None
    errors: tuple[WeightError, ...] = ()
    quality = None
    opened = _open(checkpoint, against.spec, findings)
    if opened is not None:
        tensors = sum(map(len, opened.layout.tensors))
        compared_bytes, errors = _compare_tensors(opened, against, thresholds, findings, workers, progress, started_s)
        if all(f.kind in ("scale", "bytes", "weights") for f in findings):
            if not opened.fp8 and prompts:
                max_logit_error = _compare_logits(checkpoint, opened, against, prompts, findings)
            elif opened.fp8 and texts:
                quality = _measure(checkpoint, opened, against, texts, thresholds, findings, block_progress)
    findings.sort(key=lambda f: (KINDS.index(f.kind), -f.extent))
    return VerifyReport(
        checkpoint=checkpoint,
        precision="fp8" if opened is not None and opened.fp8 else "bf16",
        findings=tuple(findings),
        tensors=tensors,
        compared_bytes=compared_bytes,
        prompt_tokens=0 if opened is not None and opened.fp8 else sum(map(len, prompts)),
        max_logit_error=max_logit_error,
        weights=errors,
        quality=quality,
        elapsed_s=time.monotonic() - started_s,
    )


def default_prompts(spec: ModelSpec) -> list[list[int]]:
    """Two prompts of token ids spread over the vocabulary, the same for every run."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, spec.vocab_size, count).tolist() for count in _DEFAULT_PROMPT_TOKENS]


def is_trtllm(folder: Path) -> bool:
    """Whether ``folder`` is a TensorRT-LLM checkpoint, not a Hugging Face folder."""
    return not any(folder.glob("model*.safetensors"))


def _check_prompts(prompts: Sequence[Sequence[int]], spec: ModelSpec) -> None:
    for prompt in prompts:
        if not prompt or not all(0 <= token < spec.vocab_size for token in prompt):
            raise UsageError(
                "bad-prompt",
                f"{str(prompt)[:80]} is not a list of token ids below {spec.vocab_size}.",
                next="Give at least one token id of the model's vocabulary.",
            )


def _open(checkpoint: Path, spec: ModelSpec, findings: list[Finding]) -> _Opened | None:
    """Read and compare ``config.json`` and the headers; None when the rest cannot be read by them."""
    config = None
    try:
        if is_trtllm(checkpoint):
            config, found = read_config(checkpoint)
        else:
            values = load_json(checkpoint / "config.json")
            values.pop("quantization_config", None)  # that is hf_layout's
            found = spec_from_config(values, source=str(checkpoint / "config.json"))
    except NemobuildError as error:
        findings.append(Finding("config", "config.json", str(error)))
        return None
    if found.dtype != "bfloat16" and config is not None:
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
    if any(getattr(found, n) != getattr(spec, n) for n in _SPEC_FIELDS[:4]) or found.blocks != spec.blocks:
        return None
    if config is not None:
        files = [f"rank{n}.safetensors" for n in range(config.tp * config.pp)]
        tensors, broken = _read_headers(checkpoint, files, findings)
        return _Opened(trtllm_layout(config, spec, tensors), config, broken)
    tensors, broken = _read_headers(checkpoint, sorted(f.name for f in checkpoint.glob("*.safetensors")), findings)
    merged = {name: info for held in tensors for name, info in held.items()}
    try:
        layout = hf_layout(checkpoint, spec, merged)
    except NemobuildError as error:
        if not broken:  # what contradicts may lie in the unreadable file
            findings.append(Finding("config", "quantization", str(error)))
        return None
    return _Opened(layout, None, frozenset({0}) if broken else broken)


def _read_headers(
    checkpoint: Path, files: list[str], findings: list[Finding]
) -> tuple[list[dict[str, TensorInfo]], frozenset[int]]:
    """Tensors of every file, and the indices of unreadable ones, which are findings and have none."""
    tensors: list[dict[str, TensorInfo]] = []
    broken = set()
    for n, file in enumerate(files):
        try:
            tensors.append(read_header(checkpoint / file))
        except NemobuildError as error:
            findings.append(Finding("file", file, str(error)))
            tensors.append({})
            broken.add(n)
    for path in sorted(checkpoint.glob("*.safetensors")):
        if path.name not in files:
            findings.append(Finding("file", path.name, f"config.json speaks of {len(files)} ranks only."))
    return tensors, frozenset(broken)


def _compare_tensors(
    opened: _Opened,
    against: Snapshot,
    thresholds: QualityThresholds,
    findings: list[Finding],
    workers: int | None,
    progress: Callable[[Progress], None] | None,
    started_s: float,
) -> tuple[int, tuple[WeightError, ...]]:
    """Compare all tensors; gives the checkpoint bytes that were compared, and the errors of FP8 weights."""
    layout = opened.layout
    scales, faults = check_scales(layout)
    findings += [Finding("scale", where, what) for where, what in faults]
    usable = set()
    for (rank, name), place in {(p.rank, p.name): p for _, p in layout.places}.items():
        info, where = layout.tensors[rank].get(name), layout.label(rank, name)
        dtype = FLOAT8 if place.scale else "BF16"
        if info is None:
            if rank not in opened.broken:
                findings.append(Finding("missing", where, "The tensor is not there."))
        elif info.dtype != dtype:
            findings.append(Finding("dtype", where, f"It is {info.dtype}, not {dtype}."))
        elif info.shape != place.shape:
            findings.append(Finding("shape", where, f"It has shape {info.shape}; the source implies {place.shape}."))
        elif not place.scale or (rank, place.scale) in scales:
            usable.add((rank, name))
    known = {(p.rank, p.name) for _, p in layout.places} | {(s.rank, s.name) for s in layout.scales}
    for rank, held in enumerate(layout.tensors):
        for name in held:
            if (rank, name) not in known:
                where = layout.label(rank, name)
                findings.append(Finding("unexpected", where, "Nothing in the source accounts for it."))

    uses: dict[str, list[Place]] = {name: [] for name in against.tensors}
    for source_name, place in layout.places:
        if (place.rank, place.name) in usable:
            uses[source_name].append(place)
    source = _source(against)
    differences: list[Difference] = []
    done_bytes = 0
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        compare = pool.map(lambda name: compare_source(source, name, uses[name], layout, scales), uses)
        for name, found in zip(uses, compare, strict=True):
            differences += found
            findings += [_finding(name, d, layout) for d in found if d.wrong]
            done_bytes += against.tensors[name].nbytes
            if progress is not None:
                elapsed_s = time.monotonic() - started_s
                progress(Progress(done_bytes, against.weight_bytes, 0, elapsed_s, name))
    if opened.config is not None:
        last = opened.config.pp * opened.config.tp
        for where in dirty_padding(layout, range(last - opened.config.tp, last), against.spec.vocab_size, usable):
            findings.append(Finding("bytes", where, "Rows beyond the vocabulary are not zero."))
    errors = weight_errors(differences, layout)
    for error in errors:
        if not error.error <= thresholds.max_weight_error:
            what = f"Its error is {error.error:.4g} of its weights (allowed: {thresholds.max_weight_error:.4g})."
            findings.append(Finding("weights", error.where, what, error.error))
    compared = sum(layout.tensors[rank][name].nbytes for rank, name in usable | scales.keys())
    return compared, errors


def _finding(source: str, difference: Difference, layout: Layout) -> Finding:
    where = layout.label(difference.place.rank, difference.place.name)
    share = difference.wrong / difference.values
    count = f"{difference.wrong:,} of {difference.values:,} values"
    if difference.exact:
        return Finding("bytes", where, f"{count} differ from {source}, first at {difference.where}.", share)
    what = f"{count} are further from {source} than half a step, first at {difference.where}."
    return Finding("bytes", where, what, share)


def _source(against: Snapshot) -> Source:
    fp8 = any(info.dtype == FLOAT8 for info in against.tensors.values())
    return Source(against.tensors, hf_tensors(against.path) if fp8 else {})


def _models(checkpoint: Path, opened: _Opened, against: Snapshot) -> tuple[StreamedModel, StreamedModel]:
    """The checkpoint and its source, ready to run. Raises ``NemobuildError`` for what the CPU runtime refuses."""
    source = _source(against)
    ours = trtllm_model(checkpoint) if opened.config else hf_model(against.spec, opened.layout.tensors[0])
    return ours, hf_model(against.spec, {**source.scales, **source.tensors})


def _compare_logits(
    checkpoint: Path, opened: _Opened, against: Snapshot, prompts: list[list[int]], findings: list[Finding]
) -> float | None:
    try:
        error = logit_error(*_models(checkpoint, opened, against), prompts)
    except NemobuildError as refusal:
        findings.append(Finding("logits", "forward pass", str(refusal)))
        return None
    # NaN is not within any tolerance.
    if not error <= LOGIT_TOLERANCE:
        what = f"Logits differ by up to {error:.3g} (allowed: {LOGIT_TOLERANCE:g})."
        findings.append(Finding("logits", "forward pass", what, error))
    return error


def _measure(
    checkpoint: Path,
    opened: _Opened,
    against: Snapshot,
    texts: Sequence[HeldOutText],
    thresholds: QualityThresholds,
    findings: list[Finding],
    progress: Callable[[int, int], None] | None,
) -> QualityReport | None:
    try:
        ours, theirs = _models(checkpoint, opened, against)
        report = measure_quality(theirs, ours, texts, progress)
    except UsageError:  # the texts are at fault, not the checkpoint
        raise
    except NemobuildError as refusal:
        findings.append(Finding("quality", "forward pass", str(refusal)))
        return None
    for where, what, ratio in report.failures(thresholds):
        kind = "activations" if "saturated" in what else "quality"
        findings.append(Finding(kind, where, what, ratio))
    return report
