"""What a conversion makes: the form asked for, and from it every file of the folder to be.

One road for all forms: a map of tensors to files of tensors, small documents whose text is known in advance, and files
of the source that are carried along. The executor knows none of the formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemobuild.convert import modelopt_hf, trtllm
from nemobuild.convert.fp8_map import with_fp8
from nemobuild.convert.tensor_map import TensorMap
from nemobuild.errors import IntegrityError, UsageError, nearest
from nemobuild.weights.snapshot import Snapshot

PRECISIONS, FORMATS, KV_CACHES = ("bf16", "fp8"), ("trtllm", "hf"), ("bf16", "fp8")


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a checkpoint. ``static`` False: FP8 without input scales, which are then found while running.

    ``clamp_kv`` keeps KV scales at 1 or above in the TensorRT-LLM form (see ``fp8_map.scale_value``).
    """

    precision: str = "bf16"
    format: str = "trtllm"
    kv_cache: str = "bf16"
    clamp_kv: bool = True
    static: bool = True
    tp: int = 1
    pp: int = 1

    @property
    def fp8(self) -> bool:
        return self.precision == "fp8"

    @property
    def fp8_kv(self) -> bool:
        return self.kv_cache == "fp8"

    @property
    def clamped(self) -> bool:
        return self.clamp_kv and self.format == "trtllm"


@dataclass(frozen=True, slots=True)
class Product:
    """The folder to be: files of tensors as in ``tensor_map.ranks``, text files, and files copied from the source."""

    tensor_map: TensorMap
    files: tuple[str, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    documents: Mapping[str, str]
    carried: Mapping[str, Path]


def check_form(form: Form, snapshot: Snapshot) -> None:
    """Raise ``UsageError`` for a form that does not exist or that ``snapshot`` cannot give, with the reason."""
    for what, value, known in (
        ("precision", form.precision, PRECISIONS),
        ("format", form.format, FORMATS),
        ("kv-cache", form.kv_cache, KV_CACHES),
    ):
        if value not in known:
            raise UsageError(f"bad-{what}", f"--{what} {value!r} is not supported.", next=nearest(value, known))
    if form.format == "hf" and (form.tp, form.pp) != (1, 1):
        raise _cannot("the Hugging Face form is not split over ranks", "Leave --tp and --pp out.")
    if not form.fp8:
        if snapshot.quantization is not None:
            raise _cannot(f"the weights of {snapshot.path} are FP8", "Add --precision fp8.")
        if form.format == "hf":
            raise _cannot("the source is the Hugging Face form in BF16 already", "Add --precision fp8.")
        if form.fp8_kv:
            raise _cannot("KV scales come from the calibration for FP8", "Add --precision fp8.")
    _check_source(form, snapshot)
    if not form.static and form.format == "trtllm":
        raise _cannot(
            "a TensorRT-LLM checkpoint in FP8 holds a fixed scale for the input of every linear layer, and without "
            "calibration data there is none",
            "Give calibration data, or take --format hf, where the runtime scales activations itself.",
        )
    if not form.static and form.fp8_kv:
        raise _cannot(
            "KV scales are measured, and without calibration data there are none",
            "Take --kv-cache bf16, or calibrate the BF16 form of the model with texts.",
        )


def _check_source(form: Form, snapshot: Snapshot) -> None:
    found = snapshot.quantization
    if found is None:
        return
    if not found.static and (form.static or form.format == "trtllm"):
        raise _cannot(
            f"{snapshot.path} is FP8 without input scales (activations are scaled while running), and a scale cannot "
            "be had from its weights",
            "Convert the BF16 form of the model with calibration data, or take --format hf.",
        )
    if form.fp8_kv and not found.kv_scales:
        raise _cannot(f"{snapshot.path} has no KV scales", "Take --kv-cache bf16, or convert the BF16 form.")


def product(form: Form, snapshot: Snapshot) -> Product:
    """Every file that ``form`` of ``snapshot`` has. Raises ``UsageError`` for a split that the model does not allow."""
    spec = snapshot.spec
    if form.format == "trtllm":
        tensor_map = trtllm.tensor_map(spec, form.tp, form.pp)
        if form.fp8:
            tensor_map = with_fp8(tensor_map, spec, trtllm.SCALES, kv=form.fp8_kv, static=True)
        config = trtllm.checkpoint_config(spec, form.tp, form.pp, fp8=form.fp8, fp8_kv=form.fp8_kv)
        files = tuple(f"rank{n}.safetensors" for n in range(len(tensor_map.ranks)))
        return Product(tensor_map, files, {}, config, {"config.json": _text(config)}, {})
    tensor_map = with_fp8(modelopt_hf.tensor_map(spec), spec, modelopt_hf.SCALES, kv=form.fp8_kv, static=form.static)
    tensor_map = modelopt_hf.sharded(tensor_map)
    files = modelopt_hf.file_names(len(tensor_map.ranks))
    config = modelopt_hf.config(snapshot.path, kv=form.fp8_kv, static=form.static)
    try:
        _text(config).encode()
    except ValueError as error:
        raise IntegrityError(
            "bad-config",
            f"config.json of {snapshot.path} cannot be written again.",
            why=f"It holds NaN, Infinity or half of a Unicode character ({error}).",
            next="Correct the file, or fetch it again.",
        ) from error
    documents = {
        "config.json": _text(config),
        "hf_quant_config.json": _text(modelopt_hf.quant_config(kv=form.fp8_kv)),
        **{name: _text(value) for name, value in modelopt_hf.index(tensor_map, files).items()},
    }
    carried = modelopt_hf.carried_files(snapshot.path, documents)
    return Product(tensor_map, files, {"format": "pt"}, config, documents, carried)


def _text(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _cannot(problem: str, next: str) -> UsageError:
    return UsageError("cannot-convert", f"This conversion cannot be made: {problem}.", next=next)
