"""FP8 in a Hugging Face folder: what the folder says about it, and whether its tensors agree.

Two forms are read, both with one fixed scale per tensor: NVIDIA ModelOpt's (``hf_quant_config.json``, and since 0.33
also ``quantization_config`` in ``config.json``) and that of compressed-tensors. All others are refused by name: their
scales belong to rows or blocks, or their values are not E4M3, so that nothing could be re-packed without loss.

Folders in the wild are often half right (a config edited by hand, shards of two exports), so each claim is held
against the tensors before anything is believed. Only headers are read here; the values of scales are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

from nemobuild.errors import IntegrityError, UsageError
from nemobuild.model.hf_config import load_json
from nemobuild.model.spec import ModelSpec
from nemobuild.weights.safetensors import TensorInfo

QUANT_CONFIG = "hf_quant_config.json"
FLOAT8 = "F8_E4M3"
_SCALE_DTYPES = ("F32", "BF16", "F16")
# Names of KV scales in a block, by form.
_KV_NAMES = {
    "modelopt": ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    "compressed-tensors": ("self_attn.k_scale", "self_attn.v_scale"),
}
_SUPPORTED = (
    "nemobuild reads FP8 with one fixed scale per tensor (ModelOpt's FP8, or compressed-tensors float-quantized)."
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a folder says: the form, whether the KV cache is FP8, and patterns of modules left as they were.

    ``static`` tells whether the scales of activations are fixed; None: the folder does not say.
    """

    method: str
    kv: bool
    excluded: tuple[str, ...]
    source: Path
    static: bool | None = None

    def excludes(self, module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in self.excluded)

    def is_static(self, tensors: Iterable[str]) -> bool:
        """Whether there are input scales among ``tensors``. Raises ``IntegrityError`` if it says otherwise."""
        found = any(name.endswith(".input_scale") for name in tensors)
        if self.static in (None, found):
            return found
        said, held = ("true", "there are input_scale tensors") if found else ("false", "there is no input_scale")
        raise _contradiction(self.source, f"input_activations.dynamic in its config_groups is {said}, but {held}")


@dataclass(frozen=True, slots=True)
class Quantization:
    """Scale tensors of an FP8 snapshot: by weight name, and (key, value) by block; inputs and KV may have none."""

    method: str
    weight_scales: Mapping[str, TensorInfo]
    input_scales: Mapping[str, TensorInfo]
    kv_scales: Mapping[int, tuple[TensorInfo, TensorInfo]]

    @property
    def static(self) -> bool:
        return bool(self.input_scales)


def read_scheme(path: Path, config: Mapping[str, Any]) -> Scheme | None:
    """What folder ``path`` with this ``config.json`` says about its quantisation; None: nothing.

    Raises ``UsageError`` for a form that is not supported, ``IntegrityError`` when two descriptions contradict.
    """
    inline, separate = config.get("quantization_config"), None
    if (path / QUANT_CONFIG).exists():
        separate = _modelopt(load_json(path / QUANT_CONFIG).get("quantization"), path / QUANT_CONFIG)
    if inline is None:
        return separate
    file = path / "config.json"
    if not isinstance(inline, dict):
        raise _unsupported(file, f"{str(inline)[:80]!r}")
    producer = inline.get("producer")
    by_modelopt = isinstance(producer, dict) and producer.get("name") == "modelopt"
    method = inline.get("quant_method", "modelopt" if by_modelopt else None)
    if method == "compressed-tensors":
        scheme = _compressed(inline, file)
    elif method == "modelopt":
        described = {"quant_algo": inline.get("quant_algo"), "exclude_modules": inline.get("ignore")}
        described |= {"kv_cache_quant_algo": _kv_algorithm(inline, file)}
        scheme = replace(_modelopt(described, file), static=_static(inline, file, stated=False))
    else:
        raise _unsupported(file, f"quant_method {method!r}"[:100])
    if separate is not None:
        for what, one, other in (
            ("method", separate.method, scheme.method),
            ("KV cache (kv_cache_quant_algo, kv_cache_scheme)", separate.kv, scheme.kv),
            ("excluded modules (exclude_modules, ignore)", set(separate.excluded), set(scheme.excluded)),
        ):
            if one != other:
                raise _contradiction(path, f"{QUANT_CONFIG} and config.json differ in the {what}: {one} and {other}")
    return scheme


def scales_of(scheme: Scheme, spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> Quantization:
    """The scale tensors among ``tensors``, which agree with ``scheme``.

    Raises ``IntegrityError`` when the scheme contradicts the tensors or when some are missing, ``UsageError`` for a
    folder in which only a part of the linear layers is FP8, and for scales of rows or blocks.
    """
    shapes = spec.tensor_shapes()
    linears = [name for name, shape in shapes.items() if name.startswith("model.layers.") and len(shape) == 2]
    _check_dtypes(scheme, linears, tensors)
    others = [n for n in shapes if n not in linears and n in tensors and tensors[n].dtype == FLOAT8]
    if others:
        raise UsageError(
            "unsupported-quantization",
            f"{_some(others)} of {scheme.source.parent} is FP8.",
            why="nemobuild keeps the embedding, lm_head and norms in BF16, where their errors cost most.",
            next="Take a form of the model that leaves them out of the quantisation.",
        )
    weights = {name: _stem(name) + "weight_scale" for name in linears}
    inputs = {name: _stem(name) + "input_scale" for name in linears}
    _check_all(scheme, list(weights.values()), tensors)
    if scheme.is_static(tensors):
        _check_all(scheme, list(inputs.values()), tensors)
    else:
        inputs = {}
    kv = {i: [f"model.layers.{i}.{name}" for name in _KV_NAMES[scheme.method]] for i in spec.attention_blocks}
    kv_names = [name for names in kv.values() for name in names]
    found = [name for name in kv_names if name in tensors]
    if scheme.kv and found:
        _check_all(scheme, kv_names, tensors)
    elif found:
        raise _contradiction(scheme.source, f"it says that the KV cache is not quantised, but there is {_some(found)}")
    return Quantization(
        method=scheme.method,
        weight_scales={name: tensors[scale] for name, scale in weights.items()},
        input_scales={name: tensors[scale] for name, scale in inputs.items()},
        # An FP8 KV cache without scales is one that every reader runs with scale 1: there is nothing to take over.
        kv_scales={i: (tensors[k], tensors[v]) for i, (k, v) in kv.items()} if found else {},
    )


def _check_dtypes(scheme: Scheme, linears: Sequence[str], tensors: Mapping[str, TensorInfo]) -> None:
    present = [name for name in linears if name in tensors]
    excluded = [name for name in present if scheme.excludes(name.removesuffix(".weight"))]
    fp8 = [name for name in present if tensors[name].dtype == FLOAT8]
    wrong = sorted(set(excluded) & set(fp8))
    if wrong:
        raise _contradiction(scheme.source, f"it excludes {_some(wrong)} from the quantisation, which is FP8")
    plain = [name for name in present if name not in fp8 and name not in excluded]
    if plain:
        dtype = tensors[plain[0]].dtype
        what = f"it says that all linear layers are FP8, but {_some(plain)} is {dtype}"
        raise _contradiction(scheme.source, f"{what} ({len(fp8)} of {len(present)} are FP8)")
    if excluded:
        raise UsageError(
            "partly-quantised",
            f"{scheme.source} leaves {_some(excluded)} out of the quantisation; {len(fp8)} of {len(present)} are FP8.",
            why="nemobuild re-packs folders in which all linear layers of all blocks are FP8.",
            next="Convert the BF16 form of the model with --precision fp8.",
        )


def _check_all(scheme: Scheme, names: Sequence[str], tensors: Mapping[str, TensorInfo]) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise IntegrityError(
            "scale-missing",
            f"{scheme.source.parent} lacks {_some(missing)}; {len(names) - len(missing)} of {len(names)} are there.",
            why=f"{scheme.source.name} says that every linear layer is quantised alike.",
            next="Fetch the model again, or convert its BF16 form.",
        )
    for name in names:
        info = tensors[name]
        if info.shape not in ((), (1,)):
            raise _unsupported(info.file, f"{name} of shape {info.shape}, which is a scale per row or block")
        if info.dtype not in _SCALE_DTYPES:
            raise _unsupported(info.file, f"{name} of type {info.dtype}")


def _modelopt(value: object, file: Path) -> Scheme:
    if not isinstance(value, dict):
        raise _contradiction(file, "it has no object 'quantization'")
    algorithm, kv = value.get("quant_algo"), value.get("kv_cache_quant_algo")
    if algorithm != "FP8":
        raise _unsupported(file, f"quant_algo {str(algorithm)[:80]!r}")
    if kv not in (None, "FP8"):
        raise _unsupported(file, f"kv_cache_quant_algo {str(kv)[:80]!r}")
    return Scheme("modelopt", kv == "FP8", _patterns(value.get("exclude_modules"), file), file)


def _compressed(value: Mapping[str, Any], file: Path) -> Scheme:
    if value.get("format") not in ("float-quantized", None):
        raise _unsupported(file, f"compressed-tensors of format {str(value.get('format'))[:80]!r}")
    static = _static(value, file, stated=True)
    kv = _kv_algorithm(value, file) == "FP8"
    return Scheme("compressed-tensors", kv, _patterns(value.get("ignore"), file), file, static)


def _static(value: Mapping[str, Any], file: Path, *, stated: bool) -> bool | None:
    """Whether ``config_groups`` says that input scales are fixed; None: it does not say.

    Refuses what is not E4M3 with one scale per tensor. ModelOpt leaves some of it out, or all, since its
    ``quant_algo`` says it; only it may scale inputs while running. ``stated`` demands every field.
    """
    groups = value.get("config_groups")
    if groups is None and not stated:
        return None
    if not isinstance(groups, dict) or not groups:
        raise _unsupported(file, f"config_groups {_summary(groups)!r}")
    found = set()
    for name, group in groups.items():
        for part in ("weights", "input_activations"):
            args = group.get(part) if isinstance(group, dict) else "nothing"
            if args is None and not stated:
                continue
            known = (None, False, True) if part == "input_activations" and not stated else (None, False)
            if not _is_float8(args, known) or args.get("strategy", None if stated else "tensor") != "tensor":
                raise _unsupported(file, f"config_groups.{name}.{part} {_summary(args)}")
            if part == "input_activations":
                found.add(args.get("dynamic"))
        if group.get("targets", None if stated else ["Linear"]) != ["Linear"] or group.get("output_activations"):
            raise _unsupported(file, f"config_groups.{name} for other targets than all linear layers")
    if len(found) > 1:
        raise _unsupported(file, "config_groups that differ in input_activations.dynamic")
    dynamic = found.pop() if found else None
    return None if dynamic is None else not dynamic


def _kv_algorithm(value: Mapping[str, Any], file: Path) -> str | None:
    scheme = value.get("kv_cache_scheme")
    if scheme in (None, "FP8"):
        return scheme
    if not _is_float8(scheme):
        raise _unsupported(file, f"kv_cache_scheme {_summary(scheme)!r}")
    return "FP8"


def _is_float8(args: object, dynamic: Sequence[object] = (None, False)) -> TypeGuard[dict[str, Any]]:
    if not isinstance(args, dict):
        return False
    return args.get("num_bits") == 8 and args.get("type") == "float" and args.get("dynamic") in dynamic


def _patterns(value: object, file: Path) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _unsupported(file, "an exclude list that is no list of names")
    if regex := [v for v in value if v.startswith("re:")]:
        raise _unsupported(file, f"the pattern {regex[0][:80]!r} in its exclude list")
    return tuple(value)


def _summary(args: object) -> str:
    """The few fields that tell one scheme from another."""
    if not isinstance(args, dict):
        return str(args)[:80]
    return ", ".join(f"{k}={args[k]!r}" for k in ("num_bits", "type", "strategy", "group_size", "dynamic") if k in args)


def _stem(weight: str) -> str:
    return weight.removesuffix("weight")


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} (and {len(names) - 1} more)"


def _unsupported(file: Path, what: str) -> UsageError:
    return UsageError(
        "unsupported-quantization",
        f"{file} has {what}.",
        why=_SUPPORTED,
        next="Take the BF16 form of the model, and convert it with --precision fp8 if FP8 is wanted.",
    )


def _contradiction(file: Path, problem: str) -> IntegrityError:
    return IntegrityError(
        "quantization-contradiction",
        f"{file} contradicts the folder: {problem}.",
        why="Weights under a wrong scale, or without one, give plausible nonsense.",
        next="Fetch the model again, or take its BF16 form.",
    )
