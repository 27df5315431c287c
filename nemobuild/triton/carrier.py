"""Find a Triton to run: ``tritonserver`` on PATH, else the real one that a wheel in the package index carries.

``nvidia-pytriton`` ships the server binary, its Python backend, and one *stub* per Python version: the process that
runs a Python model. We use none of its Python code. The wheel is unpacked once; beside it stands one small folder
per environment, shaped like a virtual environment:

    backends/python/   the backend, and beside it, where Triton looks, the stub of this Python version
    lib/               links that give the stub the shared libpython of this interpreter, under the name it asks for
    bin/, pyvenv.cfg   make the interpreter inside the stub find its standard library and the site-packages below
    lib/python*/site-packages/*.pth   the package folders of the running environment, after a NumPy of our choice

Why each is needed. In an environment manager's ``lib`` a hundred libraries would shadow those of the server, so only
libpython is linked (3.13's stub asks for it under a name that the wheel's builder made; the copy in the wheel is one
3.13.0, built for paths that exist nowhere else). From Python 3.11 on the stub starts its interpreter isolated, which
ignores PYTHONPATH and PYTHONHOME: what counts is the first ``python3`` on PATH and the ``pyvenv.cfg`` above it. And
the stubs are compiled for the array layout of NumPy 1: under NumPy 2 they read an item size of 0, and every tensor
silently turns into repetitions of its first item. So they get a pinned NumPy 1 of their own. Python 3.13 has no
NumPy 1; there, in our copy of the stub, the five reads of the item size are moved to where NumPy 2 keeps it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemobuild.errors import IntegrityError, ToolchainError, from_os_error
from nemobuild.wheels import cache_folder, fetch_wheel, file_lock, unpack

REQUIREMENT = "nvidia-pytriton==0.7.0"
SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
TRITON_VERSION = "2.51.0"
MIN_GLIBC = (2, 35)
# Python version -> the NumPy that the stub gets. Digests are those of the manylinux x86-64 wheels.
STUB_NUMPY = {
    "3.10": ("numpy==1.26.4", "ffa75af20b44f8dba823498024771d5ac50620e6915abac414251bd971b4529f"),
    "3.11": ("numpy==1.26.4", "666dbfb6ec68962c033a450943ded891bed2d54e6755e35e5835d63f4f6931d5"),
    "3.12": ("numpy==1.26.4", "675d61ffbfa78604709862923189bad94014bef562cc35cf61d3a07bba02a7ed"),
    "3.13": ("numpy==2.2.6", "1bc23a79bfabc5d056d106f9befb8d50c31ced2fbc70eedb8155aec74a45798f"),
}
# Reads of PyArray_Descr.elsize in the stub: offset in the file, instruction before, instruction after.
# NumPy 1 keeps it at byte 0x20, NumPy 2 at 0x28 (the flags became 64 bits wide and moved before it).
_STUB_PATCHES = {
    "3.13": (
        (0xA6C71, b"\x48\x63\x40\x20", b"\x48\x63\x40\x28"),  # movslq 0x20(%rax),%rax in PbTensor's constructors
        (0xA6E8D, b"\x48\x63\x40\x20", b"\x48\x63\x40\x28"),
        (0xA7661, b"\x48\x63\x40\x20", b"\x48\x63\x40\x28"),
        (0xA78A6, b"\x48\x63\x40\x20", b"\x48\x63\x40\x28"),
        (0xACA29, b"\x8b\x40\x20", b"\x8b\x40\x28"),  # mov 0x20(%rax),%eax in pybind11::array
    )
}

_LAYOUT = "2"  # of the folder made by _assemble; change it with the layout, so that old folders are not reused
# Lines of the .pth file that Python runs: a served repository is only read. NumPy, unpacked from its wheel, may keep
# its bytecode, without which each start would compile it again.
_NO_BYTECODE = ("import numpy", "import sys; sys.dont_write_bytecode = True")
_SERVER = "pytriton/tritonserver"
_LIBRARIES = "nvidia_pytriton.libs"
_STUB = "triton_python_backend_stub"
_LIBPYTHON_NAME = re.compile(rb"libpython[0-9a-f.-]+\.so\.1\.0")


@dataclass(frozen=True, slots=True)
class TritonInstall:
    """A Triton that can be started: pass ``env`` over the present environment, and ``backend_directory`` if it is set.

    ``env`` holds whole values (what was in the environment is already part of them).
    """

    binary: Path
    backend_directory: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    origin: str = "PATH"


def find_triton(cache: Path | None = None) -> TritonInstall:
    """The Triton of this machine. Downloads and unpacks the carried one (55 MB) when there is none on PATH.

    Raises ``ToolchainError`` when this machine or this Python cannot run the carried one, ``RemoteError`` and
    ``IntegrityError`` as ``fetch_wheel`` does.
    """
    if found := shutil.which("tritonserver"):
        return _installed(Path(found))
    return carried_triton(cache)


def carried_triton(cache: Path | None = None) -> TritonInstall:
    """The Triton in the wheel, whatever is on PATH; see ``find_triton``."""
    check_platform()
    version = _python_version()
    libpython = find_libpython()
    home = (cache or cache_folder()) / "triton"
    unpacked, numpy = home / SHA256[:16], home / STUB_NUMPY[version][1][:16]
    if not unpacked.is_dir():
        unpack(fetch_wheel(REQUIREMENT, SHA256, cache), (f"{_SERVER}/", f"{_LIBRARIES}/"), unpacked)
    if not numpy.is_dir():
        unpack(fetch_wheel(*STUB_NUMPY[version], cache), ("numpy/", "numpy.libs/"), numpy)
    folder = _assemble(home, unpacked, version, libpython, [str(numpy), *_package_folders()])
    return TritonInstall(
        binary=unpacked / _SERVER / "bin" / "tritonserver",
        backend_directory=folder / "backends",
        env={
            "LD_LIBRARY_PATH": _joined([str(folder / "lib"), str(unpacked / _LIBRARIES)], "LD_LIBRARY_PATH"),
            "PATH": _joined([str(folder / "bin")], "PATH"),
        },
        origin=REQUIREMENT,
    )


def check_platform() -> None:
    """Raise ``ToolchainError`` unless this is x86-64 Linux with the GNU C library that the carried binary needs."""
    system = f"{platform.system()} {platform.machine()}"
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or "an unknown C library"
    except (ValueError, OSError):
        library = "another C library than GNU's"
    numbers = re.fullmatch(r"glibc (\d+)\.(\d+).*", library)
    if system != "Linux x86_64" or not numbers or (int(numbers[1]), int(numbers[2])) < MIN_GLIBC:
        raise ToolchainError(
            "no-triton",
            "There is no tritonserver on PATH, and the one in the package index does not run on this machine.",
            why=f"It needs x86-64 Linux with glibc {MIN_GLIBC[0]}.{MIN_GLIBC[1]} or newer. Here: {system}, {library}.",
            next="Install Triton and put tritonserver on PATH, or work inside its container.",
        )


def find_libpython() -> Path:
    """The shared libpython of the running interpreter, or a ``ToolchainError`` that says what to install."""
    version = _python_version()
    name = f"libpython{version}.so.1.0"
    # LIBDIR is where this Python was built for; one that was moved since finds its library beside itself.
    folders = [f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib", sysconfig.get_config_var("LIBDIR")]
    folders.append(f"{sys.base_prefix}/lib/{sysconfig.get_config_var('MULTIARCH')}")
    candidates = [Path(folder) / name for folder in folders if folder]
    for candidate in [*candidates, *_registered_libraries(name)]:
        if candidate.is_file():
            return candidate.resolve()
    raise ToolchainError(
        "no-libpython",
        f"Triton's Python models need the shared library {name}, and this Python ({sys.executable}) has none.",
        next=f"On Debian or Ubuntu: apt-get install libpython{version}. Elsewhere use a Python built with "
        "--enable-shared, such as those of uv or conda.",
    )


def _python_version() -> str:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    if sys.implementation.name != "cpython" or threaded or version not in STUB_NUMPY:
        kind = f"{sys.implementation.name} {version}{' (free-threaded)' if threaded else ''}"
        raise ToolchainError(
            "triton-python",
            f"The carried Triton cannot run Python models with {kind}.",
            why=f"It supports CPython {', '.join(STUB_NUMPY)}.",
            next="Make the environment with one of these, for example: uv venv --python 3.12",
        )
    return version


def _installed(binary: Path) -> TritonInstall:
    # Its Python backend was built for one Python. When that is ours, its models may use our packages too.
    stub = binary.resolve().parent.parent / "backends" / "python" / _STUB
    wanted = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    if not stub.is_file() or wanted not in _libpython_names(stub):
        return TritonInstall(binary)
    here = str(Path(sys.executable).parent)
    path = {"PYTHONPATH": _joined(_package_folders(), "PYTHONPATH"), "PATH": _joined([here], "PATH")}
    return TritonInstall(binary, env={**path, "PYTHONDONTWRITEBYTECODE": "1"})


def _assemble(home: Path, unpacked: Path, version: str, libpython: Path, packages: list[str]) -> Path:
    """The folder of one environment, as the module docstring draws it; made once, by rename."""
    python = Path(sys.executable).resolve()
    key = hashlib.sha256("\0".join([_LAYOUT, str(libpython), str(python), *packages]).encode()).hexdigest()[:12]
    folder = home / f"python{version}-{key}"
    if folder.is_dir():  # made once and for all, by rename: in an image the cache is read-only
        return folder
    with file_lock(home / f"{folder.name}.lock"):
        if folder.is_dir():
            return folder
        try:
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=home) as work:
                stage = Path(work) / "stage"
                backend, site = stage / "backends" / "python", stage / "lib" / f"python{version}" / "site-packages"
                shutil.copytree(unpacked / _SERVER / "backends" / "python", backend)
                stub = unpacked / _SERVER / "python_backend_stubs" / version / _STUB
                (backend / _STUB).write_bytes(_patched(stub, version))
                (backend / _STUB).chmod(0o755)
                site.mkdir(parents=True)
                for name in _libpython_names(stub):
                    (stage / "lib" / name).symlink_to(libpython)
                (stage / "bin").mkdir()
                (stage / "bin" / "python3").symlink_to(python)
                config = f"home = {python.parent}\ninclude-system-site-packages = false\n"
                (stage / "pyvenv.cfg").write_text(config)
                (site / "environment.pth").write_text("\n".join([*packages, *_NO_BYTECODE]) + "\n")
                stage.rename(folder)
        except OSError as error:
            raise from_os_error(error, folder, "preparing Triton's Python backend in") from error
    return folder


def _patched(stub: Path, version: str) -> bytes:
    """The stub, its item-size reads moved where ``_STUB_PATCHES`` says so; the wheel's digest fixed what is there."""
    code = bytearray(stub.read_bytes())
    for offset, before, after in _STUB_PATCHES.get(version, ()):
        if code[offset : offset + len(before)] != before:
            raise IntegrityError("bad-stub", f"{stub} is not the one in {REQUIREMENT}.", next=f"Remove {stub}.")
        code[offset : offset + len(after)] = after
    return bytes(code)


def _libpython_names(stub: Path) -> list[str]:
    """File names of libpython that an ELF file mentions: the one it must be linked with."""
    names = sorted({match.decode() for match in _LIBPYTHON_NAME.findall(stub.read_bytes())})
    if not names:
        raise IntegrityError("bad-stub", f"{stub} names no shared libpython.")
    return names


def _package_folders() -> list[str]:
    """Where this interpreter finds installed packages: its environment's folders, then others on its path."""
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    others = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys([*own, *others]))


def _joined(first: list[str], variable: str) -> str:
    before = [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry]
    return os.pathsep.join(dict.fromkeys([*first, *before]))


def _registered_libraries(name: str) -> list[Path]:
    """Files called ``name`` that the dynamic loader's cache knows."""
    tool = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        listing = subprocess.run([tool, "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    return [Path(m[1]) for m in re.finditer(rf"^\s*{re.escape(name)} .*=> (.+)$", listing, re.MULTILINE)]
