"""Safetensors files: a bounded header, reads at offsets, and a writer whose header is known up front.

Why not the reference library: it maps files, and mapped pages count as resident memory, so a conversion would
look (and be killed) as large as its source. Here bytes are read with ``preadv`` into buffers that the caller
reuses. A file comes from strangers: the header length is held against the file size and a limit before one
byte is parsed, and the tensors must tile the data exactly, without a gap, an overlap or a rest.

The writer knows every tensor before the first byte, so it reserves the whole file at once (a full disk is met
before any work) and takes bytes in any order from any thread.

Carried into the emitted repository: standard library and NumPy only.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DoesNotFit, IntegrityError, from_os_error

MAX_HEADER_BYTES = 100_000_000
# How NumPy holds an item. BF16 and the F8 types have no NumPy type and come as their bits.
NUMPY_TYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "BF16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "I64": "<i8",
    "U64": "<u8",
    "F64": "<f8",
}
ITEM_BYTES = {dtype: np.dtype(numpy_type).itemsize for dtype, numpy_type in NUMPY_TYPES.items()}
_POINTERS = {b"version https://git-lfs": "git LFS", b"version https://hawser": "git LFS", b"# xet version": "Xet"}
_REFETCH = "Fetch the file again from its source."

Buffer = bytes | bytearray | memoryview
"""Contiguous memory; of an array it is ``array.data``."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``offset`` counts bytes from the start of ``file``. Matrices are (out, in)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a file in the order of their bytes. Raises ``IntegrityError`` for anything out of order."""
    return parse_header(path, *raw_header(path))


def raw_header(path: Path) -> tuple[bytes, int]:
    """JSON bytes of the header and the size of the file in bytes. Pointer files are recognised and named."""
    try:
        size = path.stat()
        if not stat.S_ISREG(size.st_mode):
            raise IntegrityError("not-a-file", f"{path} is not a regular file.")
        with path.open("rb") as stream:
            head = stream.read(64)
            for mark, kind in _POINTERS.items():
                if head.startswith(mark):
                    raise IntegrityError(
                        "pointer-file",
                        f"{path} is a {kind} pointer, not the weights themselves.",
                        why="The repository was cloned without its large files.",
                        next="Run `git lfs pull` in that folder, or fetch the model again.",
                    )
            length = int.from_bytes(head[:8], "little")
            if size.st_size < 8 or length > size.st_size - 8:
                raise _bad(path, f"its header claims {length:,} bytes, but the file has {size.st_size:,}", "truncated")
            if length > MAX_HEADER_BYTES:
                raise _bad(path, f"its header claims {length:,} bytes, above the limit of {MAX_HEADER_BYTES:,}")
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise from_os_error(error, path, "reading") from error
    if len(raw) != length:
        raise _bad(path, "it became shorter while it was read", "truncated")
    return raw, size.st_size


def parse_header(path: Path, raw: bytes, file_bytes: int) -> dict[str, TensorInfo]:
    """The tensors that ``raw`` describes, checked against a file of ``file_bytes``."""
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise _bad(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "__metadata__ is not an object of strings")
    start = 8 + len(raw)
    tensors = [_tensor(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise _bad(path, f"tensor {tensor.name!r} {problem}", "bad-offsets")
        end += tensor.nbytes
    if end > file_bytes:
        raise _bad(path, f"its tensors need {end:,} bytes, but the file has {file_bytes:,}", "truncated")
    if end < file_bytes:
        raise _bad(path, f"{file_bytes - end:,} bytes follow the last tensor", "trailing-bytes")
    return {t.name: t for t in tensors}


def read_into(fd: int, buffer: Buffer, offset: int, path: Path | str = "") -> None:
    """Fill ``buffer`` from ``offset`` of ``fd``; ``path`` is named in errors. Safe to call from several threads."""
    view = _flat(buffer)
    try:
        while view:
            count = os.preadv(fd, [view], offset)
            if count == 0:
                raise _bad(path, f"it ends before byte {offset + len(view):,}", "truncated")
            view, offset = view[count:], offset + count
    except OSError as error:
        raise from_os_error(error, path, "reading") from error


def write_from(fd: int, buffer: Buffer, offset: int, path: Path | str = "") -> None:
    """Write all of ``buffer`` at ``offset`` of ``fd``. Safe to call from several threads."""
    view = _flat(buffer)
    try:
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
    except OSError as error:
        raise from_os_error(error, path, "writing") from error


def read_array(info: TensorInfo, *, bits: bool = False, rows: tuple[int, int] | None = None) -> NDArray[Any]:
    """The tensor, or rows ``rows[0]`` to ``rows[1]`` of it, as an array of its own.

    BF16 comes as float32 (exact), or as its bits in uint16 with ``bits``. F8 types come as bits in uint8, all
    others in their own type.
    """
    shape, offset = info.shape, info.offset
    if rows is not None:
        first, last = rows
        if not info.shape or not 0 <= first <= last <= info.shape[0]:
            raise ValueError(f"rows {rows} of {info.name}, which has shape {info.shape}")
        row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
        shape, offset = (last - first, *info.shape[1:]), info.offset + first * row_bytes
    array = np.empty(shape, NUMPY_TYPES[info.dtype])
    try:
        fd = os.open(info.file, os.O_RDONLY)
    except OSError as error:
        raise from_os_error(error, info.file, "reading") from error
    try:
        read_into(fd, array.data, offset, info.file)
    finally:
        os.close(fd)
    return array if bits or info.dtype != "BF16" else bf16_to_float32(array)


def bf16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 values of BF16 bits; exact, since BF16 is the upper half of a float32."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def layout(
    path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """First bytes of a file (length and header) that holds ``tensors`` (name, dtype, shape) in this order.

    As in the reference library, spaces after the JSON make the data start at a multiple of 8.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        if name in header:
            raise ValueError(f"tensor {name!r} twice")
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, parse_header(path, raw, 8 + len(raw) + end)


class ShardWriter:
    """A file whose tensors are known; bytes come in any order, from any thread.

    The file is reserved whole before the first byte: raises ``DoesNotFit`` when the disk has no room. With
    ``keep`` an existing file of the right size is continued instead of emptied; ``kept`` tells whether it was.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
        keep: bool = False,
    ) -> None:
        self.path = path
        head, self.tensors = layout(path, tensors, metadata)
        self.file_bytes = len(head) + sum(t.nbytes for t in self.tensors.values())
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self.kept = keep and os.fstat(self.fd).st_size == self.file_bytes
                if not self.kept:
                    os.ftruncate(self.fd, 0)
                os.posix_fallocate(self.fd, 0, self.file_bytes)
                write_from(self.fd, head, 0, path)
            except BaseException:
                os.close(self.fd)
                raise
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise DoesNotFit(
                    "file-too-large",
                    f"{path} would have {self.file_bytes:,} bytes, more than the system allows for one file.",
                    why="The file system or `ulimit -f` sets the limit.",
                    next="Raise the limit or choose another folder, then run the same command again.",
                ) from error
            raise from_os_error(error, path, "writing") from error

    def write(self, name: str, data: Buffer, offset: int = 0) -> None:
        """Put ``data`` at byte ``offset`` of tensor ``name``."""
        tensor = self.tensors[name]
        if offset < 0 or offset + memoryview(data).nbytes > tensor.nbytes:
            raise ValueError(f"{memoryview(data).nbytes} bytes at {offset} do not fit tensor {name!r}")
        write_from(self.fd, data, tensor.offset + offset, self.path)

    def sync(self) -> None:
        """Bring what was written so far to the disk. May run beside writers."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise from_os_error(error, self.path, "writing") from error

    def close(self, *, sync: bool = True) -> None:
        if self.fd >= 0:
            try:
                if sync:
                    self.sync()
            finally:
                os.close(self.fd)
                self.fd = -1


def _tensor(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _bad(path, f"the entry of tensor {name!r} is not an object")
    dtype, shape, offsets = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _bad(path, f"tensor {name!r} has the unknown dtype {dtype!r}", "unknown-dtype")
    if not isinstance(shape, list) or len(shape) > 64 or not all(_is_size(n) for n in shape):
        raise _bad(path, f"tensor {name!r} has the shape {str(shape)[:80]}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise _bad(path, f"tensor {name!r} has the offsets {str(offsets)[:80]}, not two sizes", "bad-offsets")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise _bad(path, f"tensor {name!r} spans {end - begin:,} bytes, but its shape needs {nbytes:,}", "bad-offsets")
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, nbytes)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"key {next(k for k in names if names.count(k) > 1)!r} appears twice")
    return value


def _bad(path: Path | str, problem: str, kind: str = "bad-header") -> IntegrityError:
    code = "shard-truncated" if kind == "truncated" else kind
    return IntegrityError(code, f"{path} is damaged: {problem}.", next=_REFETCH)
