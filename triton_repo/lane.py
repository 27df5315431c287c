"""A direct way to an engine in Python from the models beside it: messages of JSON over a Unix socket.

Triton's own way from model to model (BLS) does not carry many streams at once. In its stub (seen in 2.51) a thread
that begins a call waits, holding Python's lock, for the thread that hands out responses; that one waits for a reader,
and the reader for Python's lock: the model hangs for ever. BLS also keeps all responses of a call in shared memory
until it ends. Here the tokens of one moment travel in one message.

The socket has a name and no file: nothing is left behind, and a read-only file system will do. The name belongs to one
server, and whoever connects must be of its user.
"""

import contextlib
import functools
import json
import os
import queue
import socket
import struct
import threading
import time
import uuid
from pathlib import Path

import numpy as np

_LENGTH = struct.Struct(">I")
_CREDENTIALS = struct.Struct("3i")  # of a peer: pid, uid, gid


def address():
    """The name of the socket: both models are children of one server. Pids repeat in other namespaces."""
    return f"\0nemobuild-{os.stat('/proc/self/ns/pid').st_ino}-{os.getppid()}"


def end_with_server():
    """End this process when its server is gone, with its own shared memory. Triton 2.51 lets a busy one live on."""
    server = os.getppid()

    def watch():
        while os.getppid() == server:
            time.sleep(1)
        with contextlib.suppress(OSError, IndexError):
            region = Path("/proc/self/cmdline").read_text(errors="replace").split("\0")[2]
            (Path("/dev/shm") / Path(region).name).unlink()
        os._exit(1)

    threading.Thread(target=watch, name="server-watch", daemon=True).start()


class Messages:
    """JSON values over a connected socket. Iterating ends when the other side has closed."""

    def __init__(self, connection):
        self._socket, self._sending = connection, threading.Lock()

    def send(self, value):
        data = json.dumps(value, separators=(",", ":")).encode()
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def __iter__(self):
        with self._socket.makefile("rb", buffering=1 << 16) as stream:
            while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
                yield json.loads(stream.read(*_LENGTH.unpack(head)))

    def close(self):
        with contextlib.suppress(OSError):  # closed by the other side
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes who reads
        self._socket.close()


class Lane:
    """The side of the engine. ``start(arrays, on_chunk, request_id)`` begins a generation, or raises."""

    def __init__(self, start, cancel):
        self.start, self.cancel = start, cancel
        self._clients = []
        self.tokens = 0  # that the engine gave, to all who are connected
        end_with_server()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(address())
        self._socket.listen()
        threading.Thread(target=self._accept, name="lane", daemon=True).start()

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for client in self._clients:
            client.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(credentials)[1] == os.getuid():
                self._clients.append(_Client(Messages(connection), self))
            else:
                connection.close()


class _Client:
    """One connected model: its generations, by the numbers that it gave them."""

    def __init__(self, messages, lane):
        self._messages, self._lane = messages, lane
        self._name = uuid.uuid4().hex
        self._running = set()
        self._events = queue.SimpleQueue()
        for run in (self._read, self._write):
            threading.Thread(target=run, name="lane-client", daemon=True).start()

    def close(self):
        self._messages.close()

    def _read(self):
        try:
            for message in self._messages:
                if "tensors" in message:
                    self._begin(message["id"], message["tensors"])
                elif "progress" in message:
                    self._events.put((message["id"], (self._lane.tokens,), (), {}))
                else:
                    self._lane.cancel(self._id(message["id"]))
        except OSError:
            pass
        finally:
            self._events.put(None)
            for number in list(self._running):
                self._lane.cancel(self._id(number))

    def _begin(self, number, tensors):
        self._running.add(number)
        try:
            arrays = {name: np.array(values) for name, values in tensors.items()}
            self._lane.start(arrays, functools.partial(self._take, number), self._id(number))
        except Exception as error:
            self._running.discard(number)
            self._events.put((number, (), (), {"error": str(error)}))

    def _take(self, number, chunk):
        self._lane.tokens += len(chunk.tokens)  # called from the engine's one thread
        end = None
        if chunk.finished:
            self._running.discard(number)
            end = {"error": chunk.error} if chunk.finish_reason == "error" else {"reason": chunk.finish_reason}
        self._events.put((number, chunk.tokens, chunk.log_probs, end))

    def _write(self):
        while None not in (events := [self._events.get() for _ in range(self._events.qsize() or 1)]):
            try:
                self._messages.send(events)
            except OSError:
                return  # the reader hears of it too

    def _id(self, number):
        return f"{self._name}-{number}"
