"""Numbers about the service at Triton's own metrics endpoint.

Each change of a metric is a round trip to the server, so counts are kept here and handed over once a second. Triton's
histograms take one value per round trip; ours are made of counters, one per bucket, as Prometheus writes them.
"""

import threading
from bisect import bisect_left
from collections import Counter

import triton_python_backend_utils as pb_utils

PREFIX = "nemobuild_chat"
_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EDGES = (*map(str, _BOUNDS_S), "+Inf")
# Family -> (kind, meaning, label, values of the label).
_FAMILIES = {
    "tokens": ("COUNTER", "Tokens by part; generated ones are reasoning and answer", "part", "prompt reasoning answer"),
    "answers": ("COUNTER", "Answers given, by how they ended", "finish_reason", "stop length tool_calls"),
    "refusals": ("COUNTER", "Requests refused or failed", "reason", "request busy timeout internal"),
    "cancellations": ("COUNTER", "Requests whose client went away", "", ""),
    "budget_cuts": ("COUNTER", "Answers whose reasoning was ended at max_thinking_tokens", "", ""),
    "requests": ("GAUGE", "Requests here: before and after their first token", "state", "waiting running"),
    "healthy": ("GAUGE", "1 when the last token asked of the engine came in time", "", ""),
}
_TIMES = {
    "first_token": "Seconds from a request's arrival to its first token",
    "inter_token": "Seconds between two tokens of an answer",
}


class Metrics:
    """Counts of one model. Safe to use from several threads."""

    def __init__(self, period_s=1.0):
        self._counts, self._gauges, self._metrics = Counter(), Counter(), {}
        self._families = []  # Triton drops a family that nobody holds
        for name, (kind, meaning, label, values) in _FAMILIES.items():
            self._register(name, name if kind == "GAUGE" else f"{name}_total", kind, meaning, label, values.split())
        for name, meaning in _TIMES.items():
            self._register(f"{name}_bucket", f"{name}_seconds_bucket", "COUNTER", meaning, "le", _EDGES)
            self._register(f"{name}_sum", f"{name}_seconds_sum", "COUNTER", meaning, "", ())
            self._register(f"{name}_count", f"{name}_seconds_count", "COUNTER", meaning, "", ())
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(period_s,), name="metrics", daemon=True)
        self._thread.start()

    def add(self, name, label="", amount=1):
        """Count up, or move a gauge by ``amount``."""
        with self._lock:
            (self._gauges if _is_gauge(name) else self._counts)[name, label] += amount

    def put(self, name, value):
        """Set a gauge."""
        with self._lock:
            self._gauges[name, ""] = value

    def took(self, name, times_s):
        """Add durations to a histogram."""
        buckets = Counter(bisect_left(_BOUNDS_S, time_s) for time_s in times_s)
        with self._lock:
            self._counts[f"{name}_count", ""] += len(times_s)
            self._counts[f"{name}_sum", ""] += sum(times_s)
            for bucket, count in buckets.items():
                for edge in _EDGES[bucket:]:
                    self._counts[f"{name}_bucket", edge] += count

    def close(self):
        self._closed.set()
        self._thread.join()
        self._metrics.clear()
        self._families.clear()

    def _register(self, key, name, kind, meaning, label, values):
        family = pb_utils.MetricFamily(
            name=f"{PREFIX}_{name}", description=meaning, kind=getattr(pb_utils.MetricFamily, kind)
        )
        self._families.append(family)
        for value in values or ("",):
            self._metrics[key, value] = family.Metric(labels={label: value} if label else {})

    def _run(self, period_s):
        while not self._closed.wait(period_s):
            with self._lock:
                counts, self._counts = self._counts, Counter()
                gauges = dict(self._gauges)
            for key, amount in counts.items():
                self._metrics[key].increment(amount)
            for key, value in gauges.items():
                self._metrics[key].set(value)


def _is_gauge(name):
    return name in _FAMILIES and _FAMILIES[name][0] == "GAUGE"
