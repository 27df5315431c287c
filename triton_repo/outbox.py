"""Responses on their way to the clients: what is ready for one, and the thread that sends for all.

Sending is a round trip to the server that costs more than all else that is done for a token. So after each turn of
sending the thread rests for a few times as long as the turn took: an idle server sends each token at once, and a busy
one sends together what came together meanwhile. A reader that has caught up with its engine while its outbox still
waits for the turn waits with it: it then wakes once for all tokens of that time, not once for each.
"""

import json
import queue
import threading
import time
from collections import deque

import triton_python_backend_utils as pb_utils

from .common import output_tensor, respond

REST_SHARE = 4  # of the time that the turn took
LONGEST_REST_S = 0.1


class Outbox:
    """Deltas of one answer. One thread puts and closes, another sends. ``idle``: not in the queue of that one."""

    def __init__(self, sender, names):
        self.idle = threading.Event()
        self.idle.set()
        self._sender, self._names = sender, names
        self._deltas = deque()
        self._text, self._cum_log_probs = "", None
        self._sending, self._closed = threading.Lock(), False

    def put_text(self, text):
        """Text before the first delta."""
        self._text = text

    def put(self, delta, log_probs=(), ids=()):
        """``log_probs`` with the ``ids`` of their tokens, where they were asked for."""
        self._deltas.append((delta, log_probs, ids))

    def send(self):
        """Send what is ready; nothing after ``close``."""
        with self._sending:
            if not self._closed and self._deltas:
                values = self._take()
                if any(values.values()):
                    self._sender.send(self._response(values))

    def close(self, more=None):
        """From now on nothing is sent; the last response, with what is left and the outputs ``more``."""
        with self._sending:
            self._closed = True
            values = self._take() | (more or {})
            return self._response(values | {"cum_log_probs": self._cum_log_probs})

    def _take(self):
        taken = [self._deltas.popleft() for _ in range(len(self._deltas))]
        log_probs = [value for _, values, _ in taken for value in values]
        tool_calls = [call for delta, _, _ in taken for call in delta.tool_calls]
        text, self._text = self._text, ""
        if log_probs:
            self._cum_log_probs = (self._cum_log_probs or 0.0) + sum(log_probs)
        return {
            "text_output": text + "".join(delta.answer for delta, _, _ in taken),
            "reasoning_output": "".join(delta.reasoning for delta, _, _ in taken),
            "tool_calls": json.dumps(tool_calls, ensure_ascii=False) if tool_calls else None,
            "output_log_probs": log_probs or None,
            "token_ids": [token for _, _, ids in taken for token in ids] or None,
        }

    def _response(self, values):
        """Only what was asked for and what there is is made into tensors: each costs time."""
        wanted = {name: value for name, value in values.items() if name in self._names and value is not None}
        return respond(self._names, [output_tensor(name, value) for name, value in wanted.items()])


class Sender:
    """The thread that sends for all outboxes."""

    def __init__(self):
        self._ready = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def wake(self, outbox):
        """There is something in ``outbox``. False when its turn was coming anyway."""
        if not outbox.idle.is_set():
            return False
        outbox.idle.clear()
        self._ready.put(outbox)
        return True

    def close(self):
        self._ready.put(None)
        self._thread.join()

    def _run(self):
        while True:
            turn = [self._ready.get()]
            begin = time.monotonic()
            turn += [self._ready.get() for _ in range(self._ready.qsize())]
            for outbox in turn:
                if outbox is None:
                    return
                outbox.idle.set()  # before it is emptied: who puts more from now on wakes us again
                try:
                    outbox.send()
                except Exception as error:
                    pb_utils.Logger.log_error(f"cannot send a response: {error}")
            time.sleep(min(LONGEST_REST_S, REST_SHARE * (time.monotonic() - begin)))
