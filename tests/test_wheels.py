"""Pinned wheels from a package index: a real pip against a real index on the loopback, and unpacking."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from nemobuild import wheels
from nemobuild.errors import DoesNotFit, IntegrityError, RemoteError, ToolchainError, UsageError
from nemobuild.wheels import cache_folder, fetch_wheel, unpack

NAME = "carried_part-1.0-py3-none-any.whl"
PIN = "carried-part==1.0"


def write_wheel(folder: Path, extra: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = "carried_part-1.0.dist-info"
    members = {
        "carried_part/data.txt": b"data " * 1000,
        "carried_part/deep/er/x.bin": bytes(range(256)),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: carried-part\nVersion: 1.0\nRequires-Dist: not-there\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    } | (extra or {})
    with zipfile.ZipFile(folder / NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        tool = zipfile.ZipInfo("carried_part/bin/tool")
        tool.external_attr = (stat.S_IFREG | 0o750) << 16
        archive.writestr(tool, b"#!/bin/sh\n")
    return folder / NAME


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Index:
    """A package index as the standard says: a page per project, and the files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        self.wheel = write_wheel(folder / "carried-part")
        self.sha256 = sha256(self.wheel)
        (folder / "carried-part" / "index.html").write_text(f'<!DOCTYPE html><a href="{NAME}">{NAME}</a>')


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    found = Index(tmp_path / "index")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            found.asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(found.folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    # The user's own settings for pip are what decides: here an index, no cache, no other places.
    config = {"PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}", "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0"}
    for name, value in (config | {"PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def files_in(folder: Path) -> list[str]:
    """All that is left below ``folder`` except locks."""
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return sorted(f for f in files if not f.endswith(".lock"))


def test_a_wheel_is_fetched_once_and_alone(index: Index, tmp_path: Path) -> None:
    wheel = fetch_wheel(PIN, index.sha256, tmp_path / "cache")
    assert wheel.name == NAME
    assert wheel.read_bytes() == index.wheel.read_bytes()
    assert files_in(tmp_path / "cache") == [wheel.relative_to(tmp_path / "cache").as_posix()]
    assert not any("not-there" in path for path in index.asked)
    index.asked.clear()
    assert fetch_wheel(PIN, index.sha256, tmp_path / "cache") == wheel
    assert index.asked == []


def test_a_damaged_cache_is_fetched_again(index: Index, tmp_path: Path) -> None:
    wheel = fetch_wheel(PIN, index.sha256, tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:-1])
    assert sha256(fetch_wheel(PIN, index.sha256, tmp_path)) == index.sha256


def test_what_a_killed_process_left_does_not_matter(index: Index, tmp_path: Path) -> None:
    stage = tmp_path / "cache" / "wheels" / f"{index.sha256[:16]}.partial"
    (stage / "wheel").mkdir(parents=True)
    (stage / "wheel" / "half-1.0-py3-none-any.whl").write_bytes(b"half")
    wheel = fetch_wheel(PIN, index.sha256, tmp_path / "cache")
    assert sha256(wheel) == index.sha256
    assert not stage.exists()


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(index: Index, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        fetch_wheel(PIN, "0" * 64, tmp_path / "cache")
    assert caught.value.code == "wheel-digest"
    assert index.sha256 in caught.value.why
    assert files_in(tmp_path / "cache") == []


def test_the_index_does_not_have_it(index: Index, tmp_path: Path) -> None:
    with pytest.raises(RemoteError) as caught:
        fetch_wheel("carried-part==2.0", index.sha256, tmp_path / "cache")
    assert caught.value.code == "package-index"
    assert "carried-part==2.0" in caught.value.why  # pip's last line
    assert files_in(tmp_path / "cache") == []


def test_the_index_is_away(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    with pytest.raises(RemoteError) as caught:
        fetch_wheel(PIN, index.sha256, tmp_path / "cache")
    assert "pip says" in caught.value.why
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "requirement", ["carried-part", "carried-part>=1", "carried-part==1.0 --pre", "-r x", "a==1;b"]
)
def test_only_a_pinned_requirement_is_asked_for(requirement: str, index: Index, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fetch_wheel(requirement, index.sha256, tmp_path)
    assert caught.value.code == "not-pinned"
    assert index.asked == []


def test_two_processes_at_once_download_once(index: Index, tmp_path: Path) -> None:
    script = "import sys, pathlib\nfrom nemobuild.wheels import fetch_wheel\n"
    script += "print(fetch_wheel(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])))"
    command = [sys.executable, "-c", script, PIN, index.sha256, str(tmp_path / "cache")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    places = {child.communicate(timeout=120)[0].strip() for child in children}
    assert len(places) == 1
    assert sha256(Path(places.pop())) == index.sha256
    assert sum(path.endswith(".whl") for path in index.asked) == 1


def without_pip(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in names else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_an_environment_without_pip_uses_the_one_that_python_carries(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pip(monkeypatch, "pip")
    monkeypatch.setenv("PATH", "")
    bundled = importlib.util.find_spec("ensurepip")
    assert bundled is not None
    assert bundled.origin is not None
    if not list(Path(bundled.origin).parent.glob("_bundled/pip-*.whl")):
        pytest.skip("this Python carries no pip")
    assert sha256(fetch_wheel(PIN, index.sha256, tmp_path)) == index.sha256


def test_a_pip_on_path_is_the_last_resort(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("pip3"):
        pytest.skip("no pip on PATH")
    without_pip(monkeypatch, "pip", "ensurepip")
    assert sha256(fetch_wheel(PIN, index.sha256, tmp_path)) == index.sha256


def test_no_pip_at_all(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pip(monkeypatch, "pip", "ensurepip")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolchainError) as caught:
        fetch_wheel(PIN, index.sha256, tmp_path / "cache")
    assert caught.value.code == "no-pip"
    assert files_in(tmp_path / "cache") == []


def test_a_full_disk_leaves_nothing(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip runs as a child, so the disk is full for it alone: a stand-in that fails as pip does on a full disk."""
    full = tmp_path / "bin" / "pip3"
    full.parent.mkdir()
    text = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    full.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n")
    full.chmod(0o755)
    without_pip(monkeypatch, "pip", "ensurepip")
    monkeypatch.setenv("PATH", str(full.parent), prepend=os.pathsep)
    with pytest.raises(DoesNotFit) as caught:
        fetch_wheel(PIN, index.sha256, tmp_path / "cache")
    assert caught.value.code == "disk-full"
    assert files_in(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError):
        fetch_wheel(PIN, index.sha256, tmp_path / "file")


def test_unpacking_takes_what_was_asked_for(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "w")
    folder = unpack(wheel, ("carried_part/deep/", "carried_part/bin/"), tmp_path / "out" / "part")
    assert files_in(folder) == ["carried_part/bin/tool", "carried_part/deep/er/x.bin"]
    assert (folder / "carried_part/deep/er/x.bin").read_bytes() == bytes(range(256))
    assert os.access(folder / "carried_part/bin/tool", os.X_OK)
    assert not os.access(folder / "carried_part/deep/er/x.bin", os.X_OK)
    wheel.unlink()  # a second call needs nothing
    assert unpack(wheel, ("carried_part/",), folder) == folder
    assert sorted(p.name for p in folder.parent.iterdir()) == ["part", "part.lock"]


@pytest.mark.parametrize("name", ["carried_part/../../evil", "/tmp/evil", "carried_part/..", "carried_part\\..\\evil"])
def test_members_that_would_land_outside_are_refused(name: str, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "w", {name: b"evil"})
    with pytest.raises(IntegrityError) as caught:
        unpack(wheel, ("",), tmp_path / "out" / "part")
    assert caught.value.code == "bad-wheel"
    assert files_in(tmp_path / "out") == []
    assert not (tmp_path / "evil").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "w")
    link = zipfile.ZipInfo("carried_part/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(IntegrityError, match="neither a file nor a folder"):
        unpack(wheel, ("carried_part/",), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_wheel_leaves_nothing(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "w")
    raw = bytearray(wheel.read_bytes())
    raw[60] ^= 0xFF  # in the first member's data
    wheel.write_bytes(raw)
    with pytest.raises(IntegrityError):
        unpack(wheel, ("carried_part/",), tmp_path / "out")
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(IntegrityError):
        unpack(wheel, ("carried_part/",), tmp_path / "out")
    with pytest.raises(IntegrityError, match="nothing under"):
        unpack(write_wheel(tmp_path / "w"), ("other/",), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.lock", "w"]


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    wheel = write_wheel(tmp_path / "w")
    monkeypatch.setattr(wheels.shutil, "copyfileobj", full)
    with pytest.raises(DoesNotFit):
        unpack(wheel, ("carried_part/",), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.lock", "w"]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NEMOBUILD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "nemobuild"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == tmp_path / ".cache" / "nemobuild"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "nemobuild"
    monkeypatch.setenv("NEMOBUILD_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
