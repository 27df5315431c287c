"""What the kernel says about this machine: memory with the container's limit, shared memory, who listens where."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

_LISTENING = "0A"  # a socket's state in /proc/net/tcp


@dataclass(frozen=True, slots=True)
class HostMemory:
    """``total_bytes`` is what this process may use at most: the machine's memory, or the limit of its control group."""

    total_bytes: int
    available_bytes: int
    limited: bool


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP socket that accepts connections. ``program`` is None for a process of another user."""

    address: str
    port: int
    pid: int | None
    program: str | None

    @property
    def exposed(self) -> bool:
        """Whether other machines can reach it."""
        address = ipaddress.ip_address(self.address)
        return not (getattr(address, "ipv4_mapped", None) or address).is_loopback


def host_memory() -> HostMemory:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, available = (int(fields[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    limited = False
    for limit, used in _group_limits():
        limited |= limit < total
        total, available = min(total, limit), min(available, max(0, limit - used))
    return HostMemory(total, available, limited)


def _group_limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of every control group (version 2, or 1) above this process; page cache is not used."""
    found = []
    own = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    below = Path("/sys/fs/cgroup") / (own[1] if own else "")
    folders = [folder for folder in (below, *below.parents) if folder.is_relative_to("/sys/fs/cgroup")]
    names = [(folder, "memory.max", "memory.current", "inactive_file") for folder in folders]
    version_1 = Path("/sys/fs/cgroup/memory")
    names.append((version_1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    for folder, limit, usage, cache in names:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            cached = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            used = int((folder / usage).read_text()) - int(cached[1] if cached else 0)
            found.append((int((folder / limit).read_text()), used))
    return found


def listeners() -> list[Listener]:
    """Every listening TCP socket of this network namespace, by port."""
    owners = _socket_owners()
    found = []
    for file, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", file).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING:
                    host, _, port = fields[1].partition(":")
                    pid = owners.get(fields[9])
                    found.append(Listener(_address(host, family), int(port, 16), pid, _program(pid)))
    return sorted(found, key=lambda listener: (listener.port, listener.address))


def _address(text: str, family: socket.AddressFamily) -> str:
    """``0100007F`` is 127.0.0.1: 32-bit words in the machine's byte order."""
    words = bytes.fromhex(text)
    return socket.inet_ntop(family, b"".join(struct.pack("=I", w) for (w,) in struct.iter_unpack(">I", words)))


def _socket_owners() -> dict[str, int]:
    """Inode of a socket -> a process that holds it, as far as we may look."""
    owners: dict[str, int] = {}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):
                    target = os.readlink(entry.path)
                    if target.startswith("socket:["):
                        owners[target[8:-1]] = int(folder.parent.name)
    return owners


def _program(pid: int | None) -> str | None:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return None
