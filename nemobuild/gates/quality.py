"""Is the checkpoint what its source says, and is the model as good as the one before it?

Two comparisons on the same held-out texts. ``verify`` holds the checkpoint against the weights that it was made from:
every byte in BF16, the bounds of the profile's ``quality`` in FP8. It cannot find a source that is itself worse than
the last one; ``against_last`` does, by running both versions side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemobuild.config import EngineConfig
from nemobuild.convert.quality import HeldOutText, QualityReport, QualityThresholds, TextQuality, measure_quality
from nemobuild.convert.quality_plot import svg_errors
from nemobuild.convert.samples import held_out, load_samples
from nemobuild.convert.verify import VerifyReport, is_trtllm, verify
from nemobuild.convert.verify_models import StreamedModel, hf_model, hf_tensors, trtllm_model
from nemobuild.gates.results import Check, Gate, at_most
from nemobuild.model.tokenizer import load_tokenizer
from nemobuild.weights.snapshot import Snapshot, open_snapshot

_WORST = 5


def held_out_texts(snapshot: Snapshot, tokens_per_text: int, texts: Path | None = None) -> list[HeldOutText]:
    """The texts that a model is judged on (default: those that ship), as its own token ids."""
    tokens = min(tokens_per_text, snapshot.spec.max_context_tokens)
    loaded = load_samples(texts or held_out(), snapshot.path, snapshot.spec, tokens_per_sample=tokens)
    return [HeldOutText(s.token_ids, s.language or "", f"Line {s.line} of {loaded.path}") for s in loaded.samples]


def verified(
    checkpoint: Path, source: Path, profile: EngineConfig, progress: Callable[[int, int], None] = lambda done, all: None
) -> tuple[Gate, str | None]:
    """The gate ``verify`` for ``checkpoint`` against its ``source``, and for FP8 the error by block as SVG."""
    snapshot = open_snapshot(source, fp8=True)
    thresholds = QualityThresholds(**profile.quality.model_dump())
    texts = held_out_texts(snapshot, profile.gates.tokens_per_text) if profile.checkpoint.precision == "fp8" else []
    report = verify(checkpoint, snapshot, texts=texts, thresholds=thresholds, block_progress=progress)
    picture = None
    if report.quality is not None:
        picture = svg_errors(checkpoint.name, report.quality, report.weights, thresholds)
    return Gate("verify", _verify_checks(report, thresholds), report.elapsed_s, details=_told(report)), picture


def against_last(
    model: Path,
    source: Path,
    last: Path,
    last_source: Path,
    profile: EngineConfig,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> Gate:
    """The gate ``quality``: the weights that are served (a checkpoint, or a Hugging Face folder) against the last ones.

    ``source`` and ``last_source`` hold their tokenizers. Versions of another shape or with other tokens cannot be
    compared token by token; the gate then says so.
    """
    started_s = time.monotonic()
    snapshot, before = open_snapshot(source, fp8=True), open_snapshot(last_source, fp8=True)
    tokens = [load_tokenizer(s.path, s.spec).get_vocab(with_added_tokens=True) for s in (snapshot, before)]
    if snapshot.spec != before.spec or tokens[0] != tokens[1]:
        return Gate("quality", skipped="the version before has another shape or other tokens")
    texts = held_out_texts(snapshot, profile.gates.tokens_per_text)
    found = measure_quality(_opened(last), _opened(model), texts, progress)
    bound = profile.gates.max_perplexity_increase
    checks = (
        at_most("increase of perplexity over the version before", found.total.perplexity_increase, bound, "+.2%"),
        Check("mean KL divergence from the version before", f"{found.total.divergence:.4f} nats", "", None),
        Check("same greedy token as the version before", f"{found.total.greedy_agreement:.1%}", "", None),
    )
    return Gate("quality", checks, time.monotonic() - started_s, details=_texts(found))


def _opened(folder: Path) -> StreamedModel:
    if is_trtllm(folder):
        return trtllm_model(folder)
    return hf_model(open_snapshot(folder, fp8=True).spec, hf_tensors(folder))


def _verify_checks(report: VerifyReport, thresholds: QualityThresholds) -> tuple[Check, ...]:
    checks = [at_most("findings", len(report.findings), 0, "d")]
    checks += [Check(f"{f.kind}: {f.where}", f.what, "", False) for f in report.findings[:_WORST]]
    if report.max_logit_error is not None:
        checks.append(Check("largest difference of logits", f"{report.max_logit_error:.2e}", "", None))
    if report.quality is not None:
        total = report.quality.total
        checks += [
            at_most("mean KL divergence from BF16, nats", total.divergence, thresholds.max_divergence),
            at_most(
                "increase of perplexity over BF16",
                total.perplexity_increase,
                thresholds.max_perplexity_increase,
                "+.2%",
            ),
        ]
    return tuple(checks)


def _told(report: VerifyReport) -> dict[str, Any]:
    told: dict[str, Any] = {
        "precision": report.precision,
        "tensors": report.tensors,
        "compared_bytes": report.compared_bytes,
        "findings": [asdict(finding) for finding in report.findings],
    }
    return told | (_texts(report.quality) if report.quality else {})


def _texts(quality: QualityReport) -> dict[str, Any]:
    return {"total": _text(quality.total), "languages": [_text(one) for one in quality.languages]}


def _text(one: TextQuality) -> dict[str, Any]:
    return asdict(one) | {"perplexity_increase": one.perplexity_increase}
