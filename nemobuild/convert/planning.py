"""The plan of a conversion: all that can be known and checked before the first weight is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from nemobuild.convert.bf16 import BUFFERS_PER_CHUNK
from nemobuild.convert.forms import Form, Product, check_form, product
from nemobuild.convert.journal import partial_folder
from nemobuild.convert.sources import SourceScales, source_scales
from nemobuild.convert.tensor_map import TensorMap, as_matrix, check
from nemobuild.convert.workers import CHUNK_BYTES, JOB_BYTES, default_workers
from nemobuild.errors import UsageError, from_os_error
from nemobuild.folders import check_free
from nemobuild.weights.safetensors import ITEM_BYTES
from nemobuild.weights.snapshot import Snapshot

# Interpreter with NumPy and the CLI, and the head room of the allocator.
BASE_MEMORY_BYTES = 96 << 20
# Room for the texts, manifest.json, the journal and the folder itself.
SMALL_FILES_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will do, proved, before any weight is read."""

    form: Form
    product: Product
    source: SourceScales | None
    inputs: dict[str, Any]
    source_bytes: int
    target_bytes: int
    carried_bytes: int
    workers: int
    peak_memory_bytes: int

    @property
    def tensor_map(self) -> TensorMap:
        return self.product.tensor_map

    @property
    def disk_bytes(self) -> int:
        """Of the finished folder, with what is carried along."""
        return self.target_bytes + self.carried_bytes + SMALL_FILES_BYTES

    @property
    def key(self) -> str:
        """sha256 (hex) of all inputs and tool versions; equal keys give equal bytes."""
        return hashlib.sha256(_canonical(self.inputs).encode()).hexdigest()


def prepare(
    snapshot: Snapshot,
    *,
    precision: str = "bf16",
    format: str = "trtllm",
    kv_cache: str = "bf16",
    clamp_kv: bool = True,
    static: bool = True,
    tp: int = 1,
    pp: int = 1,
    calibration: Mapping[str, Any] | None = None,
    workers: int | None = None,
) -> Plan:
    """Plan and prove a conversion; reads no weights, only the scales of an FP8 source.

    ``calibration`` is JSON that tells where the scales come from; it becomes a part of the key. For the others see
    ``executor.convert`` and ``Form``. Raises ``UsageError`` for a form that the source cannot give and for a split that
    the model does not allow, ``IntegrityError`` for broken scales of an FP8 source.
    """
    form = Form(precision, format, kv_cache, clamp_kv, static, tp, pp)
    check_form(form, snapshot)
    source = None if snapshot.quantization is None else source_scales(snapshot)
    made = product(form, snapshot)
    tensor_map = made.tensor_map
    check(tensor_map, snapshot.tensors)
    targets = [t for rank in tensor_map.ranks for t in rank]
    widest = max(as_matrix(t.shape)[1] for t in snapshot.tensors.values())
    if workers is None:
        workers = default_workers()
    if workers < 1:
        raise UsageError("bad-workers", f"{workers} workers cannot convert anything.", next="Give at least 1.")
    worker_bytes = BUFFERS_PER_CHUNK * max(CHUNK_BYTES, 4 * widest)
    carried = {name: _digest(path) for name, path in made.carried.items()}
    inputs = {
        "stage": "convert",
        "form": asdict(form),
        "snapshot": snapshot.fingerprint,
        "tensor_map": tensor_map.digest(),
        "config": made.config,
        "calibration": calibration,
        "carried": {name: digest for name, (digest, _) in carried.items()},
        "tools": {"nemobuild": _version()},
    }
    return Plan(
        form=form,
        product=made,
        source=source,
        inputs=inputs,
        source_bytes=snapshot.weight_bytes,
        target_bytes=sum(math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in targets),
        carried_bytes=sum(size for _, size in carried.values()),
        workers=workers,
        peak_memory_bytes=BASE_MEMORY_BYTES + workers * worker_bytes,
    )


def identity(plan: Plan) -> dict[str, str]:
    """What a partial folder is bound to; the names are shown when they differ."""
    return {
        "source files": plan.inputs["snapshot"],
        **{name.replace("_", " "): str(value) for name, value in asdict(plan.form).items()},
        "calibration": _canonical(plan.inputs["calibration"]),
        "nemobuild version": _version(),
        "plan": f"{plan.key} in jobs of {JOB_BYTES} bytes",
    }


def check_space(output: Path, plan: Plan, beside: Mapping[Path, int] | None = None) -> None:
    """Raise ``DoesNotFit`` when the disk has no room for ``output`` and for the bytes of each folder ``beside`` it.

    What an interrupted run left is counted as there already.
    """
    beside = beside or {}
    try:
        kept = [file for d in (partial_folder(output), *beside) if d.is_dir() for file in d.iterdir()]
        reserved_bytes = sum(f.stat().st_blocks * 512 for f in kept)
    except OSError as error:
        raise from_os_error(error, output, "looking at") from error
    what = "the checkpoint" + (" with the samples between two blocks" if beside else "")
    check_free(output.parent, plan.disk_bytes + sum(beside.values()) - reserved_bytes, what)


def _digest(path: Path) -> tuple[str, int]:
    """sha256 (hex) and bytes of a small file."""
    try:
        content = path.read_bytes()
        return hashlib.sha256(content).hexdigest(), len(content)
    except OSError as error:
        raise from_os_error(error, path, "reading") from error


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _version() -> str:
    try:
        return metadata.version("nemobuild")
    except metadata.PackageNotFoundError:
        return "unknown"
