"""A slice of a model: some of its blocks with embedding, head and tokenizer, as a small Hugging Face folder.

From the Hub only the bytes of the needed tensors are asked for: the headers of the shards first, then ranges. What
that proves is less than ``hub.fetch`` proves, and ``source.json`` says so: the Hub's digests are of whole files, so
for a range only the pinned commit, the lengths, and the types and shapes in the headers can be checked. The small
files arrive whole and are checked by their digests. A shard of the slice gets its name when its last byte is on the
disk, so a run that was cut goes on with the next one; the folder appears by one rename.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from nemobuild.errors import IntegrityError, NemobuildError, UsageError, from_os_error
from nemobuild.folders import check_free
from nemobuild.model.hf_config import load_json, spec_from_config
from nemobuild.model.slicing import distinct_blocks, sliced_config, sliced_names, sliced_spec
from nemobuild.weights.hub import (
    CONFIG,
    INDEX,
    PAUSES_S,
    SINGLE,
    SOURCE,
    clear_partial,
    is_whole,
    lock_on,
    select,
    weight_map,
)
from nemobuild.weights.hub_client import HubClient, Meter, Progress, RemoteFile
from nemobuild.weights.quantized import QUANT_CONFIG
from nemobuild.weights.safetensors import MAX_HEADER_BYTES, ShardWriter, TensorInfo, parse_header, read_into
from nemobuild.weights.snapshot import SOURCE_DTYPES, open_snapshot

_CONNECTIONS = 4
_ANEW = "Take another revision, or tell the owner of the repository."
_CHUNK_BYTES = 4 << 20
_CHECKED = "Lengths, types and shapes of tensors; their bytes could not be held against the digests of whole files."


@dataclass(frozen=True)
class Origin:
    """What a slice is cut from: a folder, or one commit on the Hub. ``tensors`` asks for the headers it needs."""

    identity: Mapping[str, str]
    config: Mapping[str, Any]
    files: Sequence[RemoteFile]
    tensors: Callable[[Sequence[str]], Mapping[str, TensorInfo]]
    read: Callable[[TensorInfo, Event], Iterator[bytes]]
    copy: Callable[[RemoteFile, Path, Event], object]


@dataclass(frozen=True)
class Slice:
    """What will be written, known before the first weight is read. ``tensors`` by their new names."""

    origin: Origin = field(repr=False)
    blocks: tuple[int, ...]
    of_blocks: int
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def total_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values()) + sum(f.size_bytes for f in self.origin.files)

    def record(self) -> dict[str, Any]:
        """First part of ``source.json``. Not ``repo`` and ``commit``: nobody may take a slice for the model."""
        origin, blocks = dict(self.origin.identity), list(self.blocks)
        return {"slice_of": origin, "blocks": blocks, "of_blocks": self.of_blocks, "checked": _CHECKED}


def plan_slice(origin: Origin, blocks: Sequence[int] | None) -> Slice:
    """The slice of these blocks, in this order; ``None``: of one block of each kind.

    Raises ``UsageError`` for wrong blocks and quantised weights, ``IntegrityError`` when headers contradict the config.
    """
    name = next(iter(origin.identity.values()))
    spec = spec_from_config(origin.config, source=f"{CONFIG} of {name}")
    chosen = distinct_blocks(spec) if blocks is None else tuple(blocks)
    shapes, names = sliced_spec(spec, chosen).tensor_shapes(), sliced_names(spec, chosen)
    held = origin.tensors(list(names.values()))
    for new, old in names.items():
        found = held.get(old)
        if found is None or found.shape != shapes[new] or found.dtype not in SOURCE_DTYPES:
            said = "is not there" if found is None else f"is {found.dtype} of shape {found.shape}"
            raise IntegrityError(
                "tensor-missing" if found is None else "wrong-shape" if found.shape != shapes[new] else "wrong-dtype",
                f"Tensor {old!r} of {name} {said}.",
                why=f"{CONFIG} implies shape {shapes[new]}; types that are read: {', '.join(SOURCE_DTYPES)}.",
                next="Take the BF16 form of the model, or another revision.",
            )
    tensors = {new: held[old] for new, old in names.items()}
    return Slice(origin, chosen, len(spec.blocks), sliced_config(origin.config, chosen), tensors)


def write_slice(cut: Slice, target: Path, *, progress: Progress | None = None) -> Path:
    """Folder ``target`` with the slice; one that holds it already is kept.

    Raises ``UsageError`` for a ``target`` with something else, ``DoesNotFit`` for too small a disk, and what reading
    from the origin raises. A run that failed goes on where it stopped.
    """
    target = target.absolute()
    with lock_on(target):
        if is_whole(target, cut.record(), "this slice"):
            return target
        key = hashlib.sha256(json.dumps(cut.record()).encode()).hexdigest()[:12]
        stage = target.with_name(f"{target.name}.partial-{key}")
        try:
            clear_partial(target, stage)
            there = sum(f.stat().st_size for f in stage.glob("*.safetensors"))
            check_free(target.parent, cut.total_bytes - there, "the slice")
            stage.mkdir(parents=True, exist_ok=True)
            _fill(stage, cut, progress)
            open_snapshot(stage)
            files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(stage.iterdir())}
            (stage / SOURCE).write_text(json.dumps(cut.record() | {"files": files}, indent=2) + "\n")
            stage.rename(target)
        except OSError as error:
            raise from_os_error(error, target, "writing a slice to") from error
    return target


def folder_origin(path: Path) -> Origin:
    """A local folder. Raises what ``open_snapshot`` raises."""
    snapshot = open_snapshot(path)
    listed = {f.name: RemoteFile(f.name, f.stat().st_size) for f in path.iterdir() if f.is_file()}

    def read(info: TensorInfo, stop: Event) -> Iterator[bytes]:
        with info.file.open("rb") as stream:
            for done in range(0, info.nbytes, _CHUNK_BYTES):
                piece = bytearray(min(_CHUNK_BYTES, info.nbytes - done))
                read_into(stream.fileno(), piece, info.offset + done, info.file)
                yield bytes(piece)

    return Origin(
        {"folder": str(path.absolute()), "fingerprint": snapshot.fingerprint},
        load_json(path / CONFIG),
        _small(select(listed, str(path))),
        lambda names: snapshot.tensors,
        read,
        lambda file, to, stop: shutil.copyfile(path / file.name, to),
    )


def hub_origin(
    repo_id: str,
    revision: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    pauses_s: Sequence[float] = PAUSES_S,
) -> Origin:
    """One commit on the Hub. Raises as ``hub.fetch`` does, and ``RemoteError`` where no ranges are served."""
    hub = HubClient(repo_id, endpoint, token, pauses_s)
    commit, files = hub.listing(revision)
    small = select(files, repo_id)
    with tempfile.TemporaryDirectory() as folder:
        hub.download(commit, files[CONFIG], Path(folder, CONFIG), Meter(0, None), Event())
        config, index = load_json(Path(folder, CONFIG)), weight_map(hub, commit, files, Path(folder))
    if config.get("quantization_config") is not None or QUANT_CONFIG in files:
        raise UsageError(
            "quantised-weights",
            f"{repo_id} is quantised; a slice is cut of unquantised weights.",
            next="Take the BF16 form of the model.",
        )

    def header(file: RemoteFile) -> Mapping[str, TensorInfo]:
        def get(start: int, count: int) -> bytes:
            return b"".join(hub.read_range(commit, file, start, count, Event()))

        length = int.from_bytes(get(0, 8), "little") if file.size_bytes >= 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, file.size_bytes - 8):
            raise IntegrityError("bad-header", f"{file.name} claims a header of {length:,} bytes.", next=_ANEW)
        return parse_header(Path(file.name), get(8, length), file.size_bytes)

    def tensors(names: Sequence[str]) -> Mapping[str, TensorInfo]:
        place = {n: index[n] for n in names if n in index} if index else dict.fromkeys(names, SINGLE)
        shards = sorted(set(place.values()))
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            held = dict(zip(shards, pool.map(lambda shard: header(files[shard]), shards), strict=True))
        return {name: held[shard][name] for name, shard in place.items() if name in held[shard]}

    return Origin(
        {"repo": repo_id, "commit": commit},
        config,
        _small(small),
        tensors,
        lambda info, stop: hub.read_range(commit, files[info.file.name], info.offset, info.nbytes, stop),
        lambda file, to, stop: hub.download(commit, file, to, Meter(0, None), stop),
    )


def _small(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [f for f in files if f.name not in (CONFIG, INDEX)]  # which a slice has of its own


def _fill(stage: Path, cut: Slice, progress: Progress | None) -> None:
    groups = [list(g) for _, g in itertools.groupby(cut.tensors, lambda n: n.split(".")[2] if ".layers." in n else "")]
    names = [f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors" for k in range(len(groups))]
    for entry in stage.iterdir():  # of an earlier run only whole shards are kept
        if entry.name not in names or entry.is_symlink():
            entry.unlink()
    (stage / CONFIG).write_text(json.dumps(cut.config, indent=2) + "\n")
    total = {"total_size": sum(t.nbytes for t in cut.tensors.values())}
    placed = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    (stage / INDEX).write_text(json.dumps({"metadata": total, "weight_map": placed}, indent=2) + "\n")
    meter, stop = Meter(cut.total_bytes, progress), Event()

    def copy(file: RemoteFile) -> None:
        cut.origin.copy(file, stage / file.name, stop)
        meter.add(file.size_bytes)

    pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="slice")
    try:
        jobs = [pool.submit(copy, file) for file in cut.origin.files]
        jobs += [pool.submit(_shard, stage / n, g, cut, meter, stop) for n, g in zip(names, groups, strict=True)]
        for job in jobs:
            job.result()
    finally:
        stop.set()  # after a failure or an interrupt the others end at their next piece
        pool.shutdown(cancel_futures=True)


def _shard(path: Path, names: Sequence[str], cut: Slice, meter: Meter, stop: Event) -> None:
    if path.exists():
        meter.add(sum(cut.tensors[name].nbytes for name in names))
        return
    part = path.with_suffix(".part")
    described = ((name, cut.tensors[name].dtype, cut.tensors[name].shape) for name in names)
    writer = ShardWriter(part, described, metadata={"format": "pt"})
    try:
        for name in names:
            done = 0
            for piece in cut.origin.read(cut.tensors[name], stop):
                if stop.is_set():
                    raise NemobuildError("fetch-stopped", f"{path} was stopped.")
                writer.write(name, piece, done)
                done += len(piece)
                meter.add(len(piece))
        writer.close()
    finally:
        writer.close(sync=False)
    os.replace(part, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
