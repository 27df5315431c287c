"""Does the engine still give tokens? When none came for a while, one is asked for, through the way that all take.

Ports that are open and models that are loaded say nothing about an engine that hangs. While it does, ``healthy`` is
false: ``chat`` then refuses at once, so that whoever asks for one token learns of it, and does not wait.
"""

import threading
import time

import numpy as np


class Watchdog:
    def __init__(self, generate, progress, report, period_s, timeout_s):
        """``generate()`` returns after one token or raises; ``report(healthy)`` hears of each result.

        A token that does not come may be waiting for a place: ``progress()`` changes as long as others get tokens; it
        is ``None`` when there is no answer.
        """
        self.healthy = True
        self._generate, self._progress, self._report = generate, progress, report
        self._period_s, self._timeout_s = period_s, timeout_s
        self._seen = None  # when the last token came
        self._closed = threading.Event()
        report(True)
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def saw_token(self):
        self._seen = time.monotonic()

    def close(self):
        self._closed.set()

    def _run(self):
        while not self._closed.wait(self._period_s):
            if self._seen is not None and time.monotonic() - self._seen < self._period_s:
                self._tell(True)
                continue
            done = threading.Event()
            threading.Thread(target=self._probe, args=(done,), name="probe", daemon=True).start()
            before = self._progress()
            while not done.wait(self._timeout_s):  # and no second one beside it
                now = self._progress()
                self._tell(now is not None and now != before)
                before = now

    def _probe(self, done):
        try:
            self._generate()
            self.saw_token()
            self._tell(True)
        except Exception:
            if self._seen is not None:  # else it is still being loaded
                self._tell(False)
        done.set()

    def _tell(self, healthy):
        if healthy != self.healthy:
            self.healthy = healthy
            self._report(healthy)


def one_token(token):
    """Tensors of the shortest generation there is."""
    one = np.ones((1, 1), np.int32)
    return {"input_ids": token * one, "input_lengths": one, "request_output_len": one}
