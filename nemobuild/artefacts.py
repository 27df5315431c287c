"""What each artefact of a profile is made from, as flat named values, and what the one on the disk was made from.

Checkpoint, engine and repository stand on each other, and each depends on a few of the profile's fields only. Two
records that differ say by name why an artefact is made anew; equal ones say that it need not be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemobuild import __version__
from nemobuild.config import reasoning_policy
from nemobuild.engine import tensorrt
from nemobuild.errors import NemobuildError, from_os_error
from nemobuild.folders import changed_file
from nemobuild.model.hf_config import load_json
from nemobuild.places import place, source_folder
from nemobuild.plan.planner import Plan
from nemobuild.resources import data_folder, package_folder

Values = Mapping[str, object]
MANIFEST, SOURCE = "manifest.json", "source.json"
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def stages_of(plan: Plan) -> list[str]:
    """Artefacts of the runtime, in order. ``llmapi`` in BF16 serves the source as it is."""
    converts = (plan.profile.checkpoint.format, plan.profile.checkpoint.precision) != ("hf", "bf16")
    found = ["checkpoint"] if converts else []
    return [*found, *(["engine"] if plan.profile.runtime == "tensorrt" else []), "repository"]


def artefact(plan: Plan, name: str) -> Path:
    """What the repository's engine is: the engine, the checkpoint, or the source itself."""
    stages = stages_of(plan)
    return place(name, stages[-2]) if len(stages) > 1 else source_folder(name)


def wanted(plan: Plan, name: str, stage: str, timing_cache: Path | None, below: Path | None = None) -> Values:
    """What ``stage`` of profile ``name`` is to be made from. ``timing_cache`` is one that was asked for.

    ``below`` is the artefact that it stands on, when that is not the one in its place.
    """
    return _WANTED[stage](plan, name, timing_cache, below)


def input_key(plan: Plan, name: str, stage: str, timing_cache: Path | None = None, below: Path | None = None) -> str:
    """The key in the store of what ``plan`` wants: the digest of the stage and of all that it is made from."""
    inputs = dict(wanted(plan, name, stage, timing_cache, below))
    if timing_cache is None:
        inputs.pop("timing_cache", None)
    return store_key(stage, inputs)


def snapshot_key(folder: Path) -> str | None:
    """The key of a snapshot, from what ``fetch`` wrote down; ``None`` for a folder that was not fetched."""
    try:
        source = load_json(folder / SOURCE)
    except NemobuildError:
        return None
    return store_key("snapshot", {name: value for name, value in source.items() if name != "files"})


def store_key(stage: str, inputs: Values) -> str:
    """SHA-256 of the canonical JSON of both."""
    canonical = json.dumps({"stage": stage, "inputs": inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def reasons(plan: Plan, name: str, stage: str, timing_cache: Path | None, below: Path | None = None) -> tuple[str, ...]:
    """Why the artefact that is there is not the one that ``plan`` wants; nothing when it is."""
    folder = place(name, stage)
    manifest = read_manifest(folder)
    if not manifest:
        return (f"its {MANIFEST} is missing or damaged",)
    recorded, now = _RECORDED[stage](manifest), wanted(plan, name, stage, timing_cache, below)
    found = tuple(_differences(recorded, now)) if recorded else ("it does not say what it was made from",)
    damaged = changed_file(folder, _sizes(manifest))
    return found if damaged is None else (*found, f"{damaged} is missing or was changed")


def key_of(folder: Path) -> str | None:
    """Key of an artefact, ``None`` before it is made."""
    key = read_manifest(folder).get("key")
    return None if key is None else str(key)


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """``manifest.json`` of an artefact; empty where there is none, or one that is not of the form that we write."""
    try:
        manifest = load_json(folder / MANIFEST)
    except NemobuildError:
        return {}
    inputs, files = manifest.get("inputs"), manifest.get("files")
    if not isinstance(inputs, dict) or not isinstance(files, dict):
        return {}
    sections = [inputs[name] for name in ("form", "calibration", "tools") if inputs.get(name) is not None]
    sound = all(isinstance(section, dict) for section in sections) and all(map(_is_size, files.values()))
    return manifest if sound else {}


def _is_size(entry: object) -> bool:
    return isinstance(entry.get("bytes") if isinstance(entry, dict) else entry, int)


def _sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Size of every file that a manifest lists; the repository's also has digests."""
    return {name: entry["bytes"] if isinstance(entry, dict) else entry for name, entry in manifest["files"].items()}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, inner in value.items():
        found |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return found


def _digest_of(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _differences(before: Values, after: Values) -> Iterator[str]:
    """``max_batch_size 32 -> 64`` for every field that differs."""
    for field in dict.fromkeys((*after, *before)):
        if before.get(field) != after.get(field):
            yield f"{field} {_show(before.get(field))} -> {_show(after.get(field))}"


def _show(value: object) -> str:
    text = "none" if value is None else str(value)
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_digest else text


def _checkpoint_wanted(plan: Plan, name: str, timing_cache: Path | None, below: Path | None) -> Values:
    from nemobuild.weights.snapshot import open_snapshot

    form = plan.profile.checkpoint
    snapshot = open_snapshot(source_folder(name), fp8=form.precision == "fp8")
    calibrates = form.precision == "fp8" and snapshot.quantization is None
    return {
        "source": snapshot.fingerprint,
        "precision": form.precision,
        "kv_cache": form.kv_cache,
        "kv_scales": form.kv_scales,
        "format": form.format,
        "tensor_parallel": form.files_for[0],
        "pipeline_parallel": form.files_for[1],
        **{f"calibration.{k}": v for k, v in (_calibration(plan, snapshot.path) if calibrates else {}).items()},
        "nemobuild": __version__,
    }


def _calibration(plan: Plan, source: Path) -> Values:
    """The texts that an FP8 checkpoint is calibrated with, as ``convert`` records them."""
    from nemobuild.convert.quantize import NO_DATA
    from nemobuild.convert.samples import default_calibration, prompt_digest

    given = plan.profile.checkpoint.calibration
    if given.texts == NO_DATA:
        return {}
    path = Path(given.texts or default_calibration())
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise from_os_error(error, path, "reading the calibration texts") from error
    count = sum(1 for line in raw.split(b"\n") if line.strip())
    return {
        "texts": f"sha256:{hashlib.sha256(raw).hexdigest()}",
        "prompt": prompt_digest(source, plan.profile.reasoning.policy),
        "samples": min(count, given.samples or count),
        "tokens_per_sample": given.tokens_per_sample,
    }


def _checkpoint_recorded(manifest: Mapping[str, Any]) -> Values:
    """The inputs in the manifest that ``convert`` writes, under the profile's names."""
    inputs = manifest["inputs"]
    form, calibration = inputs.get("form") or {}, inputs.get("calibration") or {}
    found = {
        "source": inputs.get("snapshot"),
        "precision": form.get("precision"),
        "kv_cache": form.get("kv_cache"),
        "kv_scales": "clamped" if form.get("clamp_kv") else "measured",
        "format": form.get("format"),
        "tensor_parallel": form.get("tp"),
        "pipeline_parallel": form.get("pp"),
        "nemobuild": (inputs.get("tools") or {}).get("nemobuild"),
    }
    fields = ("texts", "prompt", "samples", "tokens_per_sample")
    return found | {f"calibration.{field}": calibration[field] for field in fields if field in calibration}


def _engine_wanted(plan: Plan, name: str, timing_cache: Path | None, below: Path | None) -> Values:
    recorded = read_manifest(place(name, "engine")).get("inputs", {})
    wanted = tensorrt.engine_inputs(plan, key_of(below or place(name, "checkpoint")), timing_cache)
    # Timings that were not asked for do not make an engine another one.
    return wanted if timing_cache else wanted | {"timing_cache": recorded.get("timing_cache")}


def _repository_wanted(plan: Plan, name: str, timing_cache: Path | None, below: Path | None) -> Values:
    from nemobuild.weights.snapshot import open_snapshot

    profile = plan.profile.model_dump(exclude={"quality", "gates"})
    source, served = source_folder(name), below or artefact(plan, name)
    present = [source / file for file in _TEXT_FILES if (source / file).is_file()]
    code = [*package_folder().rglob("*.py"), *data_folder("triton_repo").rglob("*.py")]
    return {
        "engine": open_snapshot(source).fingerprint if served == source else key_of(served),
        **_flat(profile),
        "reasoning policy": _digest_of(json.dumps(asdict(reasoning_policy(plan.profile.reasoning.policy))).encode()),
        "tokenizer and template": _digest_of(*(path.read_bytes() for path in present)),
        "code": _digest_of(*(path.read_bytes() for path in sorted(code))),
        "nemobuild": __version__,
    }


def _inputs_recorded(manifest: Mapping[str, Any]) -> Values:
    found: Values = manifest["inputs"]
    return found


_WANTED: Mapping[str, Callable[[Plan, str, Path | None, Path | None], Values]] = {
    "checkpoint": _checkpoint_wanted,
    "engine": _engine_wanted,
    "repository": _repository_wanted,
}
_RECORDED: Mapping[str, Callable[[Mapping[str, Any]], Values]] = {
    "checkpoint": _checkpoint_recorded,
    "engine": _inputs_recorded,
    "repository": _inputs_recorded,
}
