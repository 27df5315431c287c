"""The safetensors reader and writer, against the reference library and against damaged files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nemobuild.errors import IntegrityError
from nemobuild.weights import safetensors as ours
from nemobuild.weights.safetensors import ShardWriter, layout, parse_header, read_array, read_header

ROOT = Path(__file__).parents[1]


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = {
        "matrix": rng.standard_normal((5, 7), dtype=np.float32).astype(ml_dtypes.bfloat16),
        "half": rng.standard_normal(9).astype(np.float16),
        "single": rng.standard_normal((3, 2)).astype(np.float32),
        "double": rng.standard_normal(4),
        "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3, np.int32),
        "fp8": rng.standard_normal(8, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn),
    }
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert {name: info.shape for name, info in header.items()} == {name: a.shape for name, a in arrays.items()}
    assert header["matrix"].dtype == "BF16"
    np.testing.assert_array_equal(read_array(header["matrix"]), arrays["matrix"].astype(np.float32))
    np.testing.assert_array_equal(read_array(header["matrix"], bits=True), arrays["matrix"].view(np.uint16))
    np.testing.assert_array_equal(read_array(header["fp8"]), arrays["fp8"].view(np.uint8))
    for name in ("half", "single", "double", "ids", "empty", "scalar"):
        array = read_array(header[name])
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])
    np.testing.assert_array_equal(read_array(header["single"], rows=(1, 3)), arrays["single"][1:3])
    with pytest.raises(ValueError, match="rows"):
        read_array(header["single"], rows=(1, 4))


def test_the_reference_library_reads_what_we_write(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    arrays = {f"é{i}": rng.integers(0, 255, (i + 1, 3), dtype=np.uint16) for i in range(9)}
    path = tmp_path / "b.safetensors"
    writer = ShardWriter(path, [(n, "U16", a.shape) for n, a in arrays.items()], metadata={"format": "pt"})
    assert (writer.tensors["é0"].offset) % 8 == 0

    def put(names: list[str]) -> None:
        for name in names:
            # Halves in reversed order: bytes may come in any order.
            data = arrays[name].tobytes()
            writer.write(name, data[len(data) // 2 :], len(data) // 2)
            writer.write(name, data[: len(data) // 2], 0)

    threads = [threading.Thread(target=put, args=(list(arrays)[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    loaded = load_file(path)
    assert list(read_header(path)) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    with safe_open(path, "np") as reference:
        assert reference.metadata() == {"format": "pt"}
    assert path.stat().st_size == writer.file_bytes


def test_an_empty_file_is_valid(tmp_path: Path) -> None:
    ShardWriter(tmp_path / "none.safetensors", []).close()
    assert load_file(tmp_path / "none.safetensors") == {} == read_header(tmp_path / "none.safetensors")


def test_writer_refuses_bytes_outside_of_a_tensor(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "c.safetensors", [("a", "U8", (4,)), ("b", "U8", (4,))])
    for data, offset in ((b"12345", 0), (b"1", 4), (b"1", -1)):
        with pytest.raises(ValueError, match="do not fit"):
            writer.write("a", data, offset)
    writer.close()
    writer.close()


def test_keep_continues_only_a_file_of_the_right_size(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    writer = ShardWriter(path, [("a", "U8", (4,))])
    writer.write("a", b"abcd")
    writer.close()
    kept = ShardWriter(path, [("a", "U8", (4,))], keep=True)
    assert kept.kept
    kept.write("a", b"X", 1)
    kept.close()
    assert read_array(read_header(path)["a"]).tobytes() == b"aXcd"
    other = ShardWriter(path, [("a", "U8", (5,))], keep=True)
    assert not other.kept
    other.close()
    assert read_array(read_header(path)["a"]).tobytes() == b"\0" * 5


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "header-longer-than-file": ({"header": {"a": entry(0, 4)}, "data": b"1234", "length": 10**6}, "shard-truncated"),
    "header-above-limit": ({"header": b"{}" + b" " * 4000, "length": 3999}, "bad-header"),
    "header-length-too-short": ({"header": {"a": entry(0, 4)}, "data": b"1234", "length": 9}, "bad-header"),
    "header-not-json": ({"header": b"{nonsense"}, "bad-header"),
    "header-not-utf8": ({"header": b'{"\xff\xfe": 1}'}, "bad-header"),
    "header-a-list": ({"header": []}, "bad-header"),
    "header-deeply-nested": ({"header": b"[" * 100_000}, "bad-header"),
    "entry-not-object": ({"header": {"a": 3}}, "bad-header"),
    "metadata-not-strings": ({"header": {"__metadata__": {"a": 1}}}, "bad-header"),
    "duplicate-key": (
        {"header": b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 1)).encode(),) * 2), "data": b"1"},
        "bad-header",
    ),
    "unknown-dtype": ({"header": {"a": entry(0, 4, dtype="Q4")}, "data": b"1234"}, "unknown-dtype"),
    "negative-shape": ({"header": {"a": entry(0, 4, [-2, -2])}, "data": b"1234"}, "bad-header"),
    "fractional-shape": ({"header": {"a": entry(0, 4, [4.0])}, "data": b"1234"}, "bad-header"),
    "true-as-shape": ({"header": {"a": entry(0, 1, [True])}, "data": b"1"}, "bad-header"),
    "huge-shape": ({"header": {"a": entry(0, 4, [2**62, 4])}, "data": b"1234"}, "bad-header"),
    "shape-against-bytes": ({"header": {"a": entry(0, 4, [3])}, "data": b"1234"}, "bad-offsets"),
    "offsets-not-two": (
        {"header": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, "data": b"1"},
        "bad-offsets",
    ),
    "offsets-reversed": ({"header": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}}, "bad-offsets"),
    "overlap": ({"header": {"a": entry(0, 4), "b": entry(2, 6)}, "data": b"123456"}, "bad-offsets"),
    "same-bytes-twice": ({"header": {"a": entry(0, 4), "b": entry(0, 4)}, "data": b"1234"}, "bad-offsets"),
    "gap": ({"header": {"a": entry(0, 2), "b": entry(4, 6)}, "data": b"123456"}, "bad-offsets"),
    "gap-at-start": ({"header": {"a": entry(2, 4)}, "data": b"1234"}, "bad-offsets"),
    "data-truncated": ({"header": {"a": entry(0, 8)}, "data": b"1234"}, "shard-truncated"),
    "trailing-bytes": ({"header": {"a": entry(0, 2)}, "data": b"1234"}, "trailing-bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "header-above-limit":
        monkeypatch.setattr(ours, "MAX_HEADER_BYTES", 1000)
    how, code = BAD[name]
    path = write_raw(tmp_path / "bad.safetensors", **how)
    with pytest.raises(IntegrityError) as caught:
        read_header(path)
    assert caught.value.code == code
    assert "bad.safetensors" in caught.value.what


@pytest.mark.parametrize("content", [b"", b"\x01\x02", b"\xff" * 8])
def test_too_short_files_are_truncated(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert caught.value.code == "shard-truncated"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n", "git LFS"),
        ("# xet version 0\nfilesize = 5\nhash = 'ab'\n", "Xet"),
    ],
)
def test_pointer_files_are_named(text: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text(text)
    with pytest.raises(IntegrityError, match=kind) as caught:
        read_header(tmp_path / "x.safetensors")
    assert caught.value.code == "pointer-file"


def test_things_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IntegrityError) as caught:
        read_header(tmp_path / "pipe")
    assert caught.value.code == "not-a-file"


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_header_bytes_give_tensors_or_a_clear_refusal(raw: bytes, data_bytes: int) -> None:
    try:
        tensors = parse_header(Path("any"), raw, 8 + len(raw) + data_bytes)
    except IntegrityError:
        return
    assert sum(t.nbytes for t in tensors.values()) == data_bytes


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda n: n != "__metadata__")
tensor_lists = st.lists(
    st.tuples(names, st.sampled_from(sorted(ours.ITEM_BYTES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    unique_by=lambda t: t[0],
    max_size=6,
)


@settings(deadline=None)
@given(tensor_lists)
def test_layout_and_parser_agree(tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    head, placed = layout(Path("x"), tensors)
    assert len(head) % 8 == 0
    assert {(t.name, t.dtype, t.shape) for t in placed.values()} == set(tensors)


FILL = """
import resource, signal, sys
from pathlib import Path
from nemobuild.errors import NemobuildError
from nemobuild.weights.safetensors import ShardWriter
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    ShardWriter(Path(sys.argv[1]), [("a", "U8", (8 << 20,))])
except NemobuildError as error:
    print(error.code, error.exit_status)
"""


def run_python(program: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )


def test_a_file_size_limit_is_met_before_the_first_byte(tmp_path: Path) -> None:
    result = run_python(FILL, str(tmp_path / "x.safetensors"), str(1 << 20))
    assert result.stdout.split() == ["file-too-large", "3"], result.stderr
    assert (tmp_path / "x.safetensors").stat().st_size <= 1 << 20


def test_a_full_disk_is_met_before_the_first_byte(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"'
    prefix = ("unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", str(tmp_path))
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        # No private mount here; the kernel's limit on the size of a file has to stand in.
        return test_a_file_size_limit_is_met_before_the_first_byte(tmp_path)
    result = run_python(FILL, str(tmp_path / "x.safetensors"), "0", prefix=prefix)
    assert result.stdout.split() == ["disk-full", "3"], result.stderr
    return None
