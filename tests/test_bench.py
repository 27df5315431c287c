"""``nemobuild bench``: what it counts is right, an open loop hides nothing, and both kinds of endpoint can be asked."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest

from nemobuild.bench.load import Load, Sample, put_under_load
from nemobuild.bench.prompts import prompts_from_file, short_prompts, sized_prompts
from nemobuild.bench.report import summarise, times
from nemobuild.errors import UsageError
from tests.gateway_road import served, write_road


class Slow:
    """An endpoint that answers one request at a time, each in ``service_s``, and stalls in the first."""

    url = "slow"

    def __init__(self, service_s: float, stall_s: float = 0.0) -> None:
        self.service_s, self.stall_s = service_s, stall_s
        self.most, self.now, self.asked = 0, 0, []
        self.turn = asyncio.Lock()

    async def ask(self, fields, timeout_s):
        self.asked.append(fields)
        self.now += 1
        self.most = max(self.most, self.now)
        async with self.turn:
            await asyncio.sleep(self.service_s + (self.stall_s if len(self.asked) == 1 else 0))
        self.now -= 1
        words = len(fields["messages"][0]["content"].split())
        yield {"text_output": "x", "finish_reason": "stop", "completion_tokens": 1, "prompt_tokens": 11 + 2 * words}

    async def close(self):
        pass


def run(target, load, fields=None):
    return asyncio.run(put_under_load(target, load, short_prompts(1), fields or {}, timeout_s=9, seed=1))


def test_a_closed_loop_keeps_so_many_at_once():
    target = Slow(0.001)
    samples = run(target, Load("concurrency", 3, requests=20), {"max_tokens": 5})
    assert len(samples) == 20 and target.most == 3
    assert all(fields["max_tokens"] == 5 for fields in target.asked)
    assert len({json.dumps(fields["messages"]) for fields in target.asked}) > 15  # no cache answers them


def test_a_duration_ends_the_load():
    target = Slow(0.01)
    samples = run(target, Load("concurrency", 1, duration_s=0.2))
    assert 1 <= len(samples) <= 20  # none before its time, and it ends


def test_in_an_open_loop_a_stall_counts_for_all_that_were_due():
    """One stall of half a second at 100 requests per second: in a closed loop it would be one slow request."""
    cell = summarise("slow", "auto", Load("rate", 100), run(Slow(0.0001, 0.5), Load("rate", 100, requests=100)))
    assert cell.first_token.p50 > 0.05 and cell.first_token.max > 0.45
    closed = summarise("slow", "auto", Load("concurrency", 1), run(Slow(0.0001, 0.5), Load("concurrency", 1, 100)))
    assert closed.first_token.p50 < cell.first_token.p50 and closed.first_token.max > 0.45


def test_a_late_client_counts_from_when_it_should_have_asked():
    class Hog(Slow):
        async def ask(self, fields, timeout_s):
            if not self.asked:
                time.sleep(0.5)  # nothing else runs in this process meanwhile, the sending of requests included
            async for outputs in super().ask(fields, timeout_s):
                yield outputs

    cell = summarise("slow", "auto", Load("rate", 100), run(Hog(0), Load("rate", 100, requests=40)))
    assert cell.first_token.p50 > 0.1


def test_an_open_loop_has_the_rate_that_was_asked_for():
    samples = run(Slow(0), Load("rate", 200, requests=200))
    due = sorted(sample.due_s for sample in samples)
    assert 0.6 < due[-1] - due[0] < 1.6  # when they are due, whenever they are sent
    assert len({round(b - a, 6) for a, b in itertools.pairwise(due)}) > 100  # at random, not like a clock


def test_the_numbers_of_known_samples():
    usage = {"completion_tokens": 5, "prompt_tokens": 7, "reasoning_tokens": 2, "finish_reason": "stop"}
    samples = [
        Sample(10.0, arrivals_s=[10.5, 10.7, 11.3], end_s=11.4, outputs=usage),
        Sample(11.0, arrivals_s=[11.1, 11.5], end_s=12.0, outputs=usage),
        Sample(11.0, end_s=11.2, error="400: no"),
    ]
    cell = summarise("x", "on", Load("concurrency", 2), samples)
    assert (cell.requests, cell.errors, cell.elapsed_s) == (3, {"400: no": 1}, 2.0)
    assert (cell.tokens_per_s, cell.requests_per_s, cell.thinking_share) == (5.0, 1.0, 0.4)
    assert cell.first_token.p50 == pytest.approx(0.1) and cell.first_token.max == pytest.approx(0.5)
    assert cell.inter_token.p50 == pytest.approx(0.1) and cell.inter_token.max == pytest.approx(0.2)
    assert cell.gap.max == pytest.approx(0.6) and cell.end_to_end.max == pytest.approx(1.4)
    assert times([float(k) for k in range(1, 101)]).p99 == 99 and times([]).p50 is None


def test_prompts_of_a_file(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert [prompts_from_file(text)(k)[0]["content"] for k in range(3)] == ["one", "two", "one"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"one"\n{"prompt": "two"}\n{"messages": [{"role": "user", "content": "three"}]}\n')
    assert [prompts_from_file(lines)(k)[0]["content"] for k in range(3)] == ["one", "two", "three"]
    for bad in ('{"text": 1}', "{", "7"):
        lines.write_text(f'"fine"\n{bad}\n')
        with pytest.raises(UsageError, match="Line 2"):
            prompts_from_file(lines)
    lines.write_text("")
    with pytest.raises(UsageError, match="no prompt"):
        prompts_from_file(lines)


def test_made_up_prompts_have_the_length_that_was_asked_for():
    prompts = asyncio.run(sized_prompts(Slow(0), 211, 1))
    assert len(prompts(0)[0]["content"].split()) == 100 and prompts(0) != prompts(1)
    with pytest.raises(UsageError, match="too short"):
        asyncio.run(sized_prompts(Slow(0), 11, 1))


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with served(write_road(folder), folder) as road:
        yield road


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "nemobuild", "bench", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.xdist_group("triton")
def test_triton_beside_the_gateway_in_both_modes_and_loops(road, tmp_path):
    picture = tmp_path / "bench.svg"
    loads = ("--concurrency", "1,3", "--rate", "20", "--requests", "6", "--warm-up", "1", "--reasoning", "on,off")
    done = bench(road.triton.grpc_url, "--against", road.url, *loads, "--svg", str(picture), "--json")
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert len(cells) == 2 * 2 * 3 and {cell["url"] for cell in cells} == {road.triton.grpc_url, road.url}
    for cell in cells:
        assert cell["requests"] == 6 and cell["errors"] == {} and cell["tokens_per_s"] > 0
        assert 0 < cell["first_token"]["p50"] <= cell["end_to_end"]["p50"] <= cell["end_to_end"]["max"]
        assert (cell["thinking_share"] > 0) == (cell["reasoning"] == "on")
    for mode in ("on", "off"):  # the same model says the same to both
        assert len({round(c["completion_tokens"], 6) for c in cells if c["reasoning"] == mode}) == 1
    drawn = ElementTree.parse(picture).getroot()
    lines = drawn.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * 4 * 5 and all(line.get("points") for line in lines)


@pytest.mark.xdist_group("triton")
def test_made_up_prompts_and_answers_of_a_given_length_on_real_endpoints(road):
    for url in (road.triton.grpc_url, f"{road.url}/v1"):
        done = bench(
            url, "--concurrency", "2", "--requests", "4", "--input-tokens", "700", "--max-tokens", "9", "--json"
        )
        (cell,) = json.loads(done.stdout)["cells"]
        assert cell["prompt_tokens"] == pytest.approx(700, rel=0.05) and cell["completion_tokens"] == 9


@pytest.mark.xdist_group("triton")
def test_errors_are_counted_and_nothing_but_errors_fails(road):
    done = bench(road.url, "--concurrency", "1", "--requests", "3", "--max-tokens", "99999")
    assert done.returncode == 6 and "max_completion_tokens: 99999" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--concurrency", "1.5"), "--concurrency"),
        (("--rate", "0"), "--rate"),
        (("--reasoning", "on,loud"), "loud"),
        (("--input-tokens", "9", "--prompts", "x"), "--prompts and --input-tokens"),
        (("ftp://x",), "ftp://x"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(arguments, named):
    done = bench(*arguments)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr


def test_an_endpoint_that_is_not_there():
    for url in ("127.0.0.1:9", "http://127.0.0.1:9"):
        done = bench(url)
        assert done.returncode == 6 and url in done.stderr and "Traceback" not in done.stderr
