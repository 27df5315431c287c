"""The CPU engine on a tiny model with every kind of block: right tokens under every mix of requests and faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemobuild.engine.cpu import Chunk, Engine, Generation, QueueFull, RequestError
from nemobuild.engine.cpu import panels as panels_module
from nemobuild.engine.cpu.panels import Panels, linear, panels_pay, to_panels
from nemobuild.engine.cpu.runner import RowPool, require_memory
from nemobuild.errors import DoesNotFit, UsageError
from nemobuild.model import forward as fw
from nemobuild.model.hf_config import spec_from_config
from tests.checkpoints import write_checkpoint
from tests.tiny import random_weights, tiny_config

CONFIG = tiny_config()
WEIGHTS = {name: w.astype(np.float32) for name, w in random_weights(CONFIG).items()}
WAIT_S = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG, random_weights(CONFIG), 2, 2)


@pytest.fixture(scope="module", params=["plain", "panels"])
def engine(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with closing(start(checkpoint, layout=request.param)) as engine:
        yield engine


def start(checkpoint: Path, **changes: Any) -> Engine:
    limits: dict[str, Any] = {
        "max_batch_size": 8,
        "max_context_tokens": 128,
        "kv_cache_tokens": 600,
        "max_queue_size": 64,
        "prefill_chunk_tokens": 7,
        "layout": "plain",
    }
    return Engine(checkpoint, **limits | changes)


class Client:
    """Collects the chunks of one request."""

    def __init__(self, engine: Engine, generation: Generation, **options: Any) -> None:
        self.chunks: list[Chunk] = []
        self.done = threading.Event()
        self.id = engine.submit(generation, self.on_chunk, **options)

    def on_chunk(self, chunk: Chunk) -> None:
        assert not self.done.is_set(), "a chunk after the last one"
        self.chunks.append(chunk)
        if chunk.finished:
            self.done.set()

    def wait(self) -> list[int]:
        assert self.done.wait(WAIT_S), "the request hangs"
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def reason(self) -> str | None:
        self.wait()
        return self.chunks[-1].finish_reason


def prompt(seed: int, length: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 256, length)]


def greedy(tokens: list[int], new: int, **fields: Any) -> Generation:
    return Generation(tokens, new, temperature=0.0, **fields)


_EXPECTED: dict[tuple[tuple[int, ...], int], list[int]] = {}


def expected(tokens: list[int], new: int) -> list[int]:
    """Greedy continuation by whole passes over the source weights: no cache, no batch, no checkpoint."""
    key = (tuple(tokens), new)
    if key not in _EXPECTED:
        spec, text = spec_from_config(CONFIG), list(tokens)
        ends, blocks = fw.hf_ends(spec, WEIGHTS.__getitem__), list(fw.hf_blocks(spec, WEIGHTS.__getitem__))
        for _ in range(new):
            (logits,) = fw.forward(spec, ends, blocks, [text])
            text.append(int(logits[-1].argmax()))
        _EXPECTED[key] = text[len(tokens) :]
    return _EXPECTED[key]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def assert_idle(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)


def test_32_concurrent_requests_get_their_own_tokens(engine: Engine) -> None:
    """More than the batch holds, of different lengths, joining and leaving all the time."""
    asked = [(prompt(i, 1 + i % 23), 1 + (i * 5) % 17) for i in range(32)]
    before = engine.stats().generated_tokens
    clients = [Client(engine, greedy(p, n)) for p, n in asked]
    for client, (p, n) in zip(clients, asked, strict=True):
        assert client.wait() == expected(p, n)
        assert client.reason == "length"
    assert_idle(engine)
    assert engine.stats().generated_tokens - before == sum(n for _, n in asked)


def test_greedy_does_not_depend_on_the_batch(engine: Engine) -> None:
    asked = [greedy(prompt(100 + i, 10 + i), 24) for i in range(8)]
    alone = [Client(engine, g).wait() for g in asked]
    clients = [Client(engine, g) for g in asked]
    assert [c.wait() for c in clients] == alone


def test_seeded_sampling_does_not_depend_on_the_batch(engine: Engine) -> None:
    asked = [Generation(prompt(200 + i, 9), 20, temperature=0.9, top_p=0.9, top_k=50, seed=i) for i in range(8)]
    alone = [Client(engine, g).wait() for g in asked]
    clients = [Client(engine, g) for g in asked]
    assert [c.wait() for c in clients] == alone
    same_prompt = [Client(engine, Generation(prompt(1, 9), 20, seed=seed)).wait() for seed in (1, 1, 2)]
    assert same_prompt[0] == same_prompt[1] != same_prompt[2]


def test_end_ids_and_stop_words(engine: Engine) -> None:
    tokens = prompt(7, 12)
    text = expected(tokens, 17)
    end = next(i for i in range(3, 17) if text[i] not in text[:i])
    ended = Client(engine, greedy(tokens, 17, end_ids=(text[end],)))
    assert ended.wait() == text[: end + 1], "the end token belongs to the output"
    assert ended.reason == "end"
    stopped = Client(engine, greedy(tokens, 17, stop_words=[text[end - 1 : end + 1]]))
    assert stopped.wait() == text[: end + 1]
    assert stopped.reason == "stop_word"
    later = Client(engine, greedy(tokens, 17, end_ids=(text[end],), min_new_tokens=17)).wait()
    assert len(later) == 17 and text[end] not in later[:16]


def test_log_probs(engine: Engine) -> None:
    tokens = prompt(8, 9)
    client = Client(engine, greedy(tokens, 5, return_log_probs=True))
    new = client.wait()
    assert [len(c.log_probs) for c in client.chunks] == [1] * 5
    spec = spec_from_config(CONFIG)
    ends, blocks = fw.hf_ends(spec, WEIGHTS.__getitem__), fw.hf_blocks(spec, WEIGHTS.__getitem__)
    (logits,) = fw.forward(spec, ends, blocks, [tokens + new[:-1]])
    for i, chunk in enumerate(client.chunks):
        row = logits[len(tokens) - 1 + i].astype(np.float64)
        assert chunk.log_probs[0] == pytest.approx(row[new[i]] - np.log(np.exp(row).sum()), abs=1e-3)
    assert Client(engine, greedy(tokens, 2)).wait() == new[:2]


def test_a_long_prompt_does_not_hold_the_streams_up(checkpoint: Path) -> None:
    """While a prompt of 100 tokens is read in chunks of 7, the running stream goes on."""
    with closing(start(checkpoint)) as engine:
        order: list[str] = []
        stream = greedy(prompt(1, 4), 60)
        done = threading.Event()

        def note(name: str) -> Callable[[Chunk], None]:
            def on_chunk(chunk: Chunk) -> None:
                order.append(name)
                if name == "stream" and len(order) == 3:
                    engine.submit(greedy(prompt(2, 100), 1), note("long"))
                if name == "long":
                    done.set()

            return on_chunk

        engine.submit(stream, note("stream"))
        assert done.wait(WAIT_S)
        between = order.index("long") - 3
        assert 14 <= between <= 17, order  # 100 / 7 steps, a token of the stream in each


def test_cancel_frees_the_slot(checkpoint: Path) -> None:
    with closing(start(checkpoint, max_batch_size=1)) as engine:
        endless = Client(engine, greedy(prompt(1, 4), 100), request_id="first")
        waiting = Client(engine, greedy(prompt(3, 4), 100), request_id="second")
        after = Client(engine, greedy(prompt(2, 5), 5))
        wait_until(lambda: len(endless.chunks) > 2)
        assert engine.stats().running == 1
        assert engine.cancel("second") and engine.cancel("first")
        assert after.wait() == expected(prompt(2, 5), 5)
        assert endless.reason == waiting.reason == "cancelled"
        assert len(endless.wait()) < 100 and waiting.wait() == []
        assert not engine.cancel("first"), "it is over"
        assert_idle(engine)


def test_is_cancelled_is_asked(engine: Engine) -> None:
    gone = threading.Event()
    client = Client(engine, greedy(prompt(1, 4), 100), is_cancelled=gone.is_set)
    wait_until(lambda: len(client.chunks) > 1)
    gone.set()
    assert client.reason == "cancelled"
    broken = Client(engine, greedy(prompt(1, 4), 100), is_cancelled=lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert broken.reason == "cancelled"
    assert_idle(engine)


def test_queue_limit(checkpoint: Path) -> None:
    with closing(start(checkpoint, max_batch_size=2, max_queue_size=1)) as engine:
        gate = threading.Event()
        clients = []
        engine.submit(greedy(prompt(9, 3), 1), lambda _: gate.wait(WAIT_S) and None)  # holds the loop in its callback
        wait_until(lambda: engine.stats().running == 0 and engine.stats().waiting == 0)
        clients += [Client(engine, greedy(prompt(i, 3), 2)) for i in range(3)]
        with pytest.raises(QueueFull, match="busy") as caught:
            Client(engine, greedy(prompt(4, 3), 2))
        assert caught.value.code == "queue-full"
        gate.set()
        for i, client in enumerate(clients):
            assert client.wait() == expected(prompt(i, 3), 2)
        assert Client(engine, greedy(prompt(4, 3), 2)).wait() == expected(prompt(4, 3), 2)


def test_the_kv_pool_is_never_overrun(checkpoint: Path) -> None:
    """A pool of 40 rows holds two requests of 20: the others wait, in order, and all finish."""
    with closing(start(checkpoint, kv_cache_tokens=40)) as engine:
        most = 0
        finished: list[int] = []
        clients = []
        for i in range(9):
            clients.append(Client(engine, greedy(prompt(i, 12), 8)))
        while not all(c.done.is_set() for c in clients):
            stats = engine.stats()
            most = max(most, stats.running)
            assert stats.kv_tokens_used == 20 * stats.running <= 40
            finished += [i for i, c in enumerate(clients) if c.done.is_set() and i not in finished]
        assert most == 2
        assert finished[:7] == sorted(finished[:7])
        for i, client in enumerate(clients):
            assert client.wait() == expected(prompt(i, 12), 8)
        with pytest.raises(RequestError, match="kv_cache_tokens = 40"):
            engine.submit(greedy(prompt(1, 30), 11), print)
        assert_idle(engine)


def test_a_callback_that_raises_ends_only_its_own_request(engine: Engine) -> None:
    calls = []

    def broken(chunk: Chunk) -> None:
        calls.append(chunk)
        raise RuntimeError("client gone")

    engine.submit(greedy(prompt(1, 4), 50), broken)
    others = [Client(engine, greedy(prompt(i, 6), 12)) for i in range(3)]
    for i, client in enumerate(others):
        assert client.wait() == expected(prompt(i, 6), 12)
    wait_until(lambda: engine.stats().running == 0)
    assert len(calls) == 1
    assert_idle(engine)


def test_sampling_that_fails_ends_only_its_own_request(engine: Engine) -> None:
    impossible = Client(engine, greedy(prompt(1, 4), 5, bad_words=[[t] for t in range(265)]))
    good = Client(engine, greedy(prompt(2, 6), 9))
    assert impossible.reason == "error"
    assert "every token is banned" in impossible.chunks[-1].error
    assert good.wait() == expected(prompt(2, 6), 9)
    assert_idle(engine)


def test_a_failing_step_fails_the_running_requests_and_the_engine_goes_on(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(start(checkpoint, max_batch_size=2)) as engine:
        step, calls = engine._runner.step, []

        def fails_once(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 5:
                raise MemoryError("no room")
            return step(*args)

        monkeypatch.setattr(engine._runner, "step", fails_once)
        first = [Client(engine, greedy(prompt(i, 5), 20)) for i in range(2)]
        later = Client(engine, greedy(prompt(7, 5), 6))
        for client in first:
            assert client.reason == "error"
            assert "no room" in client.chunks[-1].error
        assert later.wait() == expected(prompt(7, 5), 6)
        assert_idle(engine)


def test_close_ends_everything(checkpoint: Path) -> None:
    engine = start(checkpoint, max_batch_size=1)
    clients = [Client(engine, greedy(prompt(i, 4), 100)) for i in range(3)]
    engine.close()
    for client in clients:
        assert client.reason == "cancelled"
        assert client.chunks[-1].error == "The engine was closed."
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.submit(greedy([1], 1), print)


def test_request_ids(engine: Engine) -> None:
    gate = threading.Event()
    engine.submit(greedy([1], 1), lambda _: gate.wait(WAIT_S) and None)
    client = Client(engine, greedy([1], 1), request_id="mine")
    with pytest.raises(RequestError, match="running already"):
        engine.submit(greedy([1], 1), print, request_id="mine")
    gate.set()
    client.wait()
    assert Client(engine, greedy([1], 1), request_id="mine").wait() == client.wait()


def test_limits_of_the_engine(checkpoint: Path) -> None:
    for changes in (
        {"max_batch_size": 0},
        {"kv_cache_tokens": -1},
        {"max_context_tokens": 513},
        {"max_queue_size": -1},
    ):
        with pytest.raises(UsageError, match=next(iter(changes))):
            start(checkpoint, **changes)


def test_too_little_memory_is_said_before_loading(tmp_path: Path, checkpoint: Path) -> None:
    spec = spec_from_config(CONFIG)
    weight_bytes, kv_bytes = spec.parameter_count * 4, spec.kv_bytes_per_token(4) * 1000
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 999999 kB\nMemAvailable: {(weight_bytes + kv_bytes) // 1024} kB\n")
    with pytest.raises(DoesNotFit) as caught:
        require_memory(spec, 1001, meminfo, tmp_path / "absent")
    assert f"{weight_bytes:,}" in caught.value.why and f"{kv_bytes // 1000 * 1001:,}" in caught.value.why
    require_memory(spec, 990, meminfo, tmp_path / "absent")
    require_memory(spec, 10**15, tmp_path / "absent", tmp_path / "absent")
    for name, number in (("memory.max", weight_bytes + kv_bytes + 900), ("memory.current", 1000)):
        (tmp_path / name).write_text(f"{number}\n")
    (tmp_path / "memory.stat").write_text("inactive_file 60\nactive_file 40\n")
    require_memory(spec, 1000, tmp_path / "absent", tmp_path)
    with pytest.raises(DoesNotFit):
        require_memory(spec, 1001, tmp_path / "absent", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    require_memory(spec, 10**15, tmp_path / "absent", tmp_path)
    with pytest.raises(DoesNotFit, match="available"):
        start(checkpoint, kv_cache_tokens=10**12)


@given(st.lists(st.integers(1, 40), max_size=60), st.randoms(use_true_random=False))
def test_rows_are_never_shared_and_all_come_back(sizes: list[int], random: Any) -> None:
    pool, held = RowPool(100), []
    for size in sizes:
        if held and random.random() < 0.4:
            pool.give(*held.pop(random.randrange(len(held))))
        if (first := pool.take(size)) is not None:
            held.append((first, size))
        rows = [row for first, size in held for row in range(first, first + size)]
        assert len(set(rows)) == len(rows) == pool.used
        assert all(0 <= row < 100 for row in rows)
    for first, size in held:
        pool.give(first, size)
    assert pool.take(100) == 0


@given(st.integers(1, 100), st.integers(1, 50), st.integers(0, 40))
def test_panels_multiply_as_the_matrix(out: int, columns: int, rows: int) -> None:
    rng = np.random.default_rng(out * columns)
    weight = rng.standard_normal((out, columns), dtype=np.float32)
    x = rng.standard_normal((rows, columns), dtype=np.float32)
    panels = to_panels(weight)
    np.testing.assert_allclose(linear("", x, panels), x @ weight.T, atol=1e-4)
    picked = rng.integers(0, out, 5)
    np.testing.assert_array_equal(panels[picked], weight[picked])


@pytest.mark.parametrize("plain_is_slow", [True, False])
def test_panels_are_chosen_by_measurement(plain_is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "plain_linear" if plain_is_slow else "linear"
    monkeypatch.setattr(panels_module, slow, lambda *_: time.sleep(0.05))
    assert panels_pay(repeats=1) == plain_is_slow


def test_auto_layout_holds_panels_or_matrices(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pay in (True, False):
        monkeypatch.setattr(panels_module, "panels_pay", lambda pay=pay: pay)
        with closing(start(checkpoint, layout="auto")) as engine:
            assert isinstance(engine._runner.blocks[0].qkv, Panels) == pay
            assert Client(engine, greedy(prompt(3, 5), 4)).wait() == expected(prompt(3, 5), 4)
