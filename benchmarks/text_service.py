"""What the text layer costs: tokens per second, processor time and right texts, against three others, through Triton.

    python benchmarks/text_service.py [--streams 1,16,64] [--tokens 300] [--repeats 5] [--only chat,engine]

One Triton serves all. Its engine says given tokens, one response per token, as fast as it can, so that nothing but the
way of the tokens is measured. *engine*: the client takes tokens from the engine itself. *stateless*: an ensemble that
decodes each response for itself. *naive*: a model with a thread per request that decodes all tokens again at each
step; both in the manner of the engine era. Processor time is that of the server and all its children.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.replay.load import Stream, cpu_seconds, request, run
from benchmarks.replay.repository import Script, train_tokenizer, write_replay
from benchmarks.replay.texts import SENTENCES, token_streams
from nemobuild.triton.server import choose_endpoint, running


@dataclass(frozen=True, slots=True)
class Measured:
    tokens_per_s: float
    cpu_s_per_1000_tokens: float
    right: float
    first_token_ms: float
    responses_per_token: float


RESULTS = Path(__file__).parent / "results"
WAYS = ("engine", "chat", "stateless", "naive")
_SINGLE = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=_numbers, default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(WAYS))
    options = parser.parse_args()
    most = max(options.streams)
    cues = [f"<cue{k}>" for k in range(most)]
    tokenizer = train_tokenizer(SENTENCES, cues)
    texts = token_streams(tokenizer, most, options.tokens)
    scripts = {cue: Script(ids) for cue, ids in zip(cues, texts, strict=True)}
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        repository = write_replay(Path(folder) / "repository", tokenizer, scripts, slots=most)
        endpoint = choose_endpoint(ports=(0, 0, 0))
        with running(repository, endpoint, Path(folder) / "log") as server:
            for number in range(options.repeats + 1):
                rounds.append(
                    {
                        (way, count): measure(endpoint.grpc_url, server.pid, way, tokenizer, texts[:count], cues)
                        for count in options.streams
                        for way in options.only
                    }
                )
                print(f"round {number} of {options.repeats}{' (not counted)' * (number == 0)}", file=sys.stderr)
            first_ms = {
                tokens: first_token_ms(endpoint.grpc_url, tokenizer, cues[0], tokens) for tokens in (8, options.tokens)
            }
    report = {
        "command": shlex.join(["python", "benchmarks/text_service.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "tokens": options.tokens,
        "first_token_ms": first_ms,
        "repeats": options.repeats,
        "measured": [
            {"way": way, "streams": count} | _medians([r[way, count] for r in rounds[1:]])
            for count in options.streams
            for way in options.only
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "text_service.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "text_service.md").write_text(markdown(report))
    print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# Text layer: what it costs beside the engine alone and two ways of the engine era",
        "",
        f"`{report['command']}`",
        "",
        f"Machine: {report['machine']}. {report['tokens']} tokens a stream. Medians of {report['repeats']} rounds",
        "in which all ways take turns. The engine says given tokens as fast as it can, one response per token.",
        "",
        "| streams | way | tokens/s | to engine | server CPU s per 1,000 tokens | to engine | right texts"
        " | first token ms | responses per token |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    alone = {row["streams"]: row for row in report["measured"] if row["way"] == "engine"}
    for row in report["measured"]:
        base = alone.get(row["streams"], row)
        rate, cpu = row["tokens_per_s"], row["cpu_s_per_1000_tokens"]
        lines.append(
            f"| {row['streams']} | {row['way']} | {rate:,.0f} | {rate / base['tokens_per_s']:.2f}"
            f" | {cpu:.3f} | {cpu / base['cpu_s_per_1000_tokens']:.2f} | {row['right']:.0%}"
            f" | {row['first_token_ms']:.1f} | {row['responses_per_token']:.2f} |"
        )
    lines += ["", f"The first token of one stream on an otherwise idle server, p50 of {_SINGLE} in turns:", ""]
    lines += ["| tokens of the answer | engine ms | chat ms | added ms |", "|---:|---:|---:|---:|"]
    for tokens, ms in report["first_token_ms"].items():
        lines.append(f"| {tokens} | {ms['engine']:.2f} | {ms['chat']:.2f} | {ms['chat'] - ms['engine']:.2f} |")
    return "\n".join([*lines, ""])


def first_token_ms(url: str, tokenizer: Tokenizer, cue: str, tokens: int) -> dict[str, float]:
    """Way -> median wait for the first token, when nobody else asks; an engine goes on at full speed after it."""
    waits: dict[str, list[float]] = {"engine": [], "chat": []}
    for _ in range(_SINGLE):
        for way, found in waits.items():
            found.append(1000 * run(url, [_request(way, tokenizer, cue, tokens)])[0].first_s)
            time.sleep(0.02)
    return {way: round(statistics.median(found), 3) for way, found in waits.items()}


def measure(url: str, group: int, way: str, tokenizer: Tokenizer, texts: list[list[int]], cues: list[str]) -> Measured:
    """One round of one way: all ``texts`` asked for at once."""
    wanted = len(texts[0])
    requests = [_request(way, tokenizer, cue, wanted) for cue in cues[: len(texts)]]
    begin_cpu = cpu_seconds(group)
    streams = run(url, requests)
    used = cpu_seconds(group) - begin_cpu
    begin, end = min(s.begin for s in streams), max(s.arrived[-1][0] for s in streams)
    tokens = len(texts) * wanted
    right = sum(_text(way, tokenizer, s) == tokenizer.decode(ids) for s, ids in zip(streams, texts, strict=True))
    return Measured(
        tokens_per_s=tokens / (end - begin),
        cpu_s_per_1000_tokens=1000 * used / tokens,
        right=right / len(texts),
        first_token_ms=1000 * statistics.median(s.first_s for s in streams),
        responses_per_token=sum(len(s.arrived) for s in streams) / tokens,
    )


def _request(way: str, tokenizer: Tokenizer, cue: str, tokens: int) -> bytes:
    if way != "engine":
        return request(way, {"text_input": cue, "max_tokens": np.int32([[tokens]])}, ["text_output"])
    ids = [tokenizer.token_to_id(cue)]
    inputs = {
        "input_ids": np.int32([ids]),
        "input_lengths": np.int32([[len(ids)]]),
        "request_output_len": np.int32([[tokens]]),
        "streaming": np.array([[True]]),
        "exclude_input_in_output": np.array([[True]]),
    }
    return request("tensorrt_llm", inputs, ["output_ids", "sequence_length"])


def _text(way: str, tokenizer: Tokenizer, stream: Stream) -> str:
    outputs = stream.outputs()
    if way != "engine":
        return "".join(values.get("text_output", "") for values in outputs)
    return tokenizer.decode([token for values in outputs for token in values.get("output_ids", ())])


def _medians(measured: list[Measured]) -> dict[str, float]:
    return {f.name: round(statistics.median(getattr(m, f.name) for m in measured), 3) for f in fields(Measured)}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
