"""A local folder of Hugging Face weights, checked to be complete before anything trusts it.

Three descriptions of the same tensors must agree: the index, the headers of the files, and the shapes that
``config.json`` implies. Only headers are read, so this takes milliseconds for a model of any size. Pickled
weights are refused: to load them is to run the program that they contain. FP8 weights must be asked for, since they
mean nothing without their scales.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemobuild.errors import IntegrityError, NemobuildError, UsageError, from_os_error
from nemobuild.model.hf_config import MAX_CONFIG_BYTES, load_json, spec_from_config
from nemobuild.model.spec import ModelSpec
from nemobuild.weights.quantized import FLOAT8, QUANT_CONFIG, Quantization, read_scheme, scales_of
from nemobuild.weights.safetensors import TensorInfo, parse_header, raw_header

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SOURCE_DTYPES = ("BF16", "F16", "F32")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,250}\.safetensors")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_COMPLETE = "Fetch the model again, or restore the files named here."


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Source files of one model. ``fingerprint`` changes with any file (configs, headers, sizes, times).

    What was fetched has no times in it, but the digests that were taken then: it is the same on every machine.

    ``quantization`` tells the scales when the linear layers are FP8.
    """

    path: Path
    spec: ModelSpec
    tensors: dict[str, TensorInfo]
    ignored: tuple[str, ...]
    fingerprint: str
    quantization: Quantization | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


def open_snapshot(path: Path, *, fp8: bool = False) -> Snapshot:
    """The snapshot in folder ``path``.

    ``tensors`` holds exactly the names of ``spec.tensor_shapes()``; tensors that cannot change a result (stored
    RoPE tables, an ``lm_head`` beside tied embeddings) are listed in ``ignored``. ``fp8`` allows FP8 linear layers.
    Raises ``UsageError`` for a wrong path or an unsupported model, ``IntegrityError`` for incomplete weights.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(
            "bad-path",
            f"{path} is not a folder.",
            why="A snapshot is a folder with config.json and safetensors files.",
            next="Give the folder that holds the model.",
        )
    config = load_json(path / "config.json")
    scheme = read_scheme(path, config)
    if scheme is not None and not fp8:
        raise UsageError(
            "quantised-weights",
            f"The weights in {path} are FP8, as {scheme.source.name} says; unquantised ones are needed here.",
            next="Take the BF16 form of the model.",
        )
    spec = spec_from_config(config, source=str(path / "config.json"))
    index = _read_index(path)
    files = sorted(set(index.values())) if index is not None else [_single_file(path)]
    _check_files(path, files, indexed=index is not None)
    headers = {file: raw_header(path / file) for file in files}
    by_file = {file: parse_header(path / file, *headers[file]) for file in files}
    tensors = _merge(by_file)
    if index is not None:
        _check_index(path, index, by_file)
    quantization = None if scheme is None else scales_of(scheme, spec, tensors)
    if quantization is not None:
        pairs = (scale for pair in quantization.kv_scales.values() for scale in pair)
        scales = {t.name for t in (*quantization.weight_scales.values(), *quantization.input_scales.values(), *pairs)}
        tensors = {name: info for name, info in tensors.items() if name not in scales}
    ignored = _check_spec(path, spec, tensors, fp8=scheme is not None)
    kept = {name: tensors[name] for name in spec.tensor_shapes()}
    return Snapshot(path, spec, kept, ignored, _fingerprint(path, headers), quantization)


def fingerprint(path: Path, files: Sequence[str]) -> str:
    """Fingerprint of the files as they are now; equal to ``Snapshot.fingerprint`` while nothing changed."""
    return _fingerprint(path, {file: raw_header(path / file) for file in files})


def _fingerprint(path: Path, headers: Mapping[str, tuple[bytes, int]]) -> str:
    digest, known = hashlib.sha256(), _known_content(path)
    try:
        for config in ("config.json", QUANT_CONFIG):
            if config == "config.json" or (path / config).exists():
                with (path / config).open("rb") as stream:
                    digest.update(stream.read(MAX_CONFIG_BYTES))
        for file, (raw, size_bytes) in sorted(headers.items()):
            content = known.get(file) or known.get("") or (path / file).stat().st_mtime_ns
            digest.update(f"\0{file}\0{size_bytes}\0{content}\0".encode())
            digest.update(raw)
    except OSError as error:
        raise from_os_error(error, path, "reading") from error
    return digest.hexdigest()


def _known_content(path: Path) -> dict[str, str]:
    """What ``source.json`` says that the bytes are, by file; under the empty name for all files at once."""
    try:
        source = load_json(path / "source.json")
    except NemobuildError:
        return {}
    files = source.get("files")
    if not isinstance(files, dict):  # the demo model: its files follow from the package
        return {"": "|".join(f"{k}={source[k]}" for k in sorted(source))} if "package" in source else {}
    return {
        name: str(entry["sha256"]) for name, entry in files.items() if isinstance(entry, dict) and "sha256" in entry
    }


def _read_index(path: Path) -> dict[str, str] | None:
    file = path / INDEX
    if not file.exists():
        return None
    weight_map = load_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IntegrityError("bad-index", f"{file} has no weight_map.", next=_COMPLETE)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _FILE_NAME.fullmatch(shard):
            raise IntegrityError(
                "unsafe-index",
                f"{file} places tensor {name!r} in {str(shard)[:80]!r}.",
                why="An index may only name .safetensors files of its own folder.",
                next="Do not use this model, or fetch it again from a source that you trust.",
            )
    return weight_map


def _single_file(path: Path) -> str:
    if (path / SINGLE).exists():
        return SINGLE
    shards = sorted(f.name for f in path.glob("*.safetensors"))
    if shards:
        raise IntegrityError(
            "index-missing", f"{path} has {_some(shards)}, but neither {INDEX} nor {SINGLE}.", next=_COMPLETE
        )
    pickles = sorted(f.name for pattern in _PICKLES for f in path.glob(pattern))
    if pickles:
        raise UsageError(
            "pickled-weights",
            f"{path} has its weights only in pickled form: {_some(pickles)}.",
            why="To load a pickle is to run the program inside it, so nemobuild reads safetensors only.",
            next="Take the safetensors form of the model, or convert it where you trust the file.",
        )
    raise IntegrityError("weights-missing", f"{path} has no {SINGLE} and no {INDEX}.", next=_COMPLETE)


def _check_files(path: Path, files: Sequence[str], *, indexed: bool) -> None:
    missing = [file for file in files if not (path / file).exists()]
    if missing:
        why = f"{INDEX} names {len(files)} files." if indexed else ""
        raise IntegrityError("shard-missing", f"{path} lacks {_some(missing)}.", why=why, next=_COMPLETE)
    others = sorted({f.name for f in path.glob("*.safetensors")} - set(files))
    if indexed and others:
        raise IntegrityError(
            "shard-not-in-index",
            f"{path} has {_some(others)}, which {INDEX} does not name.",
            why="The folder mixes files of different models or revisions, or the index is out of date.",
            next="Remove the files that do not belong to the model, or fetch it again.",
        )
    if not indexed and any(map(_SHARD.fullmatch, others)):
        raise IntegrityError(
            "index-missing", f"{path} has {SINGLE} beside {_some(others)} without {INDEX}.", next=_COMPLETE
        )


def _merge(by_file: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, header in by_file.items():
        for name, info in header.items():
            if name in tensors:
                raise IntegrityError(
                    "duplicate-tensor",
                    f"Tensor {name!r} is in {tensors[name].file.name} and in {file}.",
                    next=_COMPLETE,
                )
            tensors[name] = info
    return tensors


def _check_index(path: Path, index: Mapping[str, str], by_file: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    absent = [name for name, file in index.items() if name not in by_file[file]]
    if absent:
        raise IntegrityError(
            "index-names-absent-tensors",
            f"{path / INDEX} places {_some(absent)} in {index[absent[0]]}, which does not hold it.",
            why="The index and the files are of different revisions.",
            next=_COMPLETE,
        )
    extra = [name for header in by_file.values() for name in header if name not in index]
    if extra:
        raise IntegrityError(
            "tensor-not-in-index",
            f"The files of {path} hold {_some(extra)}, which {INDEX} does not name.",
            why="The index and the files are of different revisions.",
            next=_COMPLETE,
        )


def _check_spec(path: Path, spec: ModelSpec, tensors: Mapping[str, TensorInfo], *, fp8: bool) -> tuple[str, ...]:
    """Names that are surplus and harmless. Raises for the gravest problem and counts the others of its kind."""
    expected = spec.tensor_shapes()
    extras = [name for name in tensors if name not in expected]
    ignored = tuple(n for n in extras if n.endswith("rotary_emb.inv_freq") or n == "lm_head.weight")
    missing = [n for n in expected if n not in tensors]
    unexpected = [n for n in extras if n not in ignored]
    known = (*SOURCE_DTYPES, FLOAT8) if fp8 else SOURCE_DTYPES
    dtypes = [n for n in expected if n in tensors and tensors[n].dtype not in known]
    shapes = [n for n in expected if n in tensors and tensors[n].shape != expected[n]]
    problems: list[NemobuildError] = []
    differ = "config.json and the weights are of different models, or the model is of a kind that nemobuild lacks."
    if missing:
        problems.append(IntegrityError("tensor-missing", f"{path} lacks {_some(missing)}.", why=differ, next=_COMPLETE))
    if dtypes:
        problems.append(
            IntegrityError(
                "unsupported-dtype",
                f"{path} holds {_some(dtypes)} as {tensors[dtypes[0]].dtype}.",
                why=f"Weights are read from {', '.join(SOURCE_DTYPES)}; other types are quantised or not weights.",
                next="Take the BF16 form of the model.",
            )
        )
    if shapes:
        first = shapes[0]
        what = f"{path} holds {_some(shapes)} with shape {tensors[first].shape}; config.json implies {expected[first]}."
        problems.append(IntegrityError("wrong-shape", what, why=differ, next=_COMPLETE))
    if unexpected:
        what = f"{path} holds {_some(unexpected)}, for which config.json has no place."
        problems.append(IntegrityError("unexpected-tensor", what, why=differ, next=_COMPLETE))
    if problems:
        worst = problems[0]
        if len(problems) > 1:
            worst.why += f" Also found: {', '.join(p.code for p in problems[1:])}."
        raise worst
    return ignored


def _some(names: Sequence[str]) -> str:
    """``a``, or ``a and 4 more``: one name is enough to look, the count tells how far it goes."""
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"
