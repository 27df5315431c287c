"""What the text layer costs per token, in one thread, and whether a long answer costs more at its end.

    python benchmarks/text_layer.py [--tokens 12000] [--rounds 5]

One answer of mixed languages, with reasoning, is pushed token by token, as ``chat`` does: detokenise, stop strings,
split, count. The tokenizer is the real one of Llama 3. Times are those of the thread alone; printed is the median over
the rounds. Peers in the same run: the one-shot decode of the same ids, which no stream can be cheaper than, and
``DecodeStream`` of ``tokenizers``, which only detokenises.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path

from tokenizers.decoders import DecodeStream

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the corpus and the tokenizer are those of the tests

from nemobuild.config import reasoning_policy
from nemobuild.runtime.answer import Answer
from nemobuild.runtime.detokenizer import Vocabulary
from tests.corpus import CORPUS
from tests.llama3 import EOT, llama3_tokenizer

LIMIT_US = 3.0
WINDOW = 1000
STOPS = ("\n\nUser:", "###", "<|stop|>", "END OF ANSWER")
CALL = '[{"name": "write_file", "arguments": {"path": "a.py", "text": "%s"}}]'
Push = Callable[[int], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    vocabulary = Vocabulary(llama3_tokenizer())
    policy = reasoning_policy("nemotron-super-v1.5")
    prose = [text for text in CORPUS if "<" not in text and "name" not in text]
    thought = ids_of(vocabulary, "<think>\n", prose, arguments.tokens // 2)
    plain = thought + ids_of(vocabulary, "</think>\n\n", prose, arguments.tokens - len(thought))
    called = vocabulary.encode("<TOOLCALL>" + CALL % ("print(1)\\n" * arguments.tokens))[: arguments.tokens]

    def answer(start: str = "maybe", **options: object) -> Push:
        state = Answer(
            vocabulary,
            policy,
            start=start,
            stops=STOPS,
            end_ids=(EOT,),
            tools=True,
            max_tokens=1 << 20,
            max_thinking_tokens=1 << 19,
        )
        return lambda token: state.push((token,))

    def stream() -> Push:
        state = DecodeStream(skip_special_tokens=True)
        return lambda token: state.step(vocabulary.tokenizer, token)

    rows = {
        "detokenise, stop, split, count": (plain, answer),
        "the same, inside a tool call": (called, lambda: answer("answer")),
        "DecodeStream alone": (plain, stream),
    }
    results = {name: [measured(ids, make) for _ in range(arguments.rounds)] for name, (ids, make) in rows.items()}
    once_us = statistics.median(decoded_once(vocabulary, plain) for _ in range(arguments.rounds))
    report = {name: summary(rounds) for name, rounds in results.items()}
    lines = [
        "# Text layer: microseconds per token, one thread\n",
        "`python benchmarks/text_layer.py`\n",
        f"{arguments.tokens} tokens of eight languages and more, Llama 3 tokenizer, {len(STOPS)} stops, a budget.",
        f"Python {platform.python_version()}; medians of {arguments.rounds} rounds; limit {LIMIT_US} us.\n",
        f"| | all | tokens 100 to {100 + WINDOW} | last {WINDOW} | last to first |\n|---|---:|---:|---:|---:|",
    ]
    for name, row in report.items():
        times = " | ".join(f"{row[column]:.2f}" for column in ("all", "first", "last"))
        lines.append(f"| {name} | {times} | {row['last'] / row['first']:.2f}x |")
    lines.append(f"| one-shot decode | {once_us:.2f} | | | |")
    print("\n".join(lines))
    file = Path(__file__).parent / "results" / "text_layer.json"
    file.write_text(json.dumps({"us_per_token": report, "one_shot_us": once_us, "limit_us": LIMIT_US}, indent=1) + "\n")
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")


def ids_of(vocabulary: Vocabulary, head: str, texts: list[str], count: int) -> list[int]:
    ids = vocabulary.encode(head)
    for text in cycle(texts):
        if len(ids) >= count:
            return ids[:count]
        ids += vocabulary.encode(text)
    raise AssertionError


def measured(ids: list[int], make: Callable[[], Push]) -> tuple[float, float, float]:
    """Microseconds per token: of all, of the first window after token 100, and of the last."""
    push, clock = make(), time.thread_time
    marks = [0, 100, 100 + WINDOW, len(ids) - WINDOW, len(ids)]
    times = []
    gc.collect()
    for begin, end in pairwise(marks):
        piece, started = ids[begin:end], clock()
        for token in piece:
            push(token)
        times.append(clock() - started)
    return sum(times) / len(ids) * 1e6, times[1] / WINDOW * 1e6, times[3] / WINDOW * 1e6


def decoded_once(vocabulary: Vocabulary, ids: list[int]) -> float:
    """Microseconds per token of a one-shot decode."""
    started = time.thread_time()
    vocabulary.decode(ids)
    return (time.thread_time() - started) / len(ids) * 1e6


def summary(rounds: list[tuple[float, float, float]]) -> dict[str, float]:
    columns = zip(*rounds, strict=True)
    return dict(zip(("all", "first", "last"), (statistics.median(column) for column in columns), strict=True))


if __name__ == "__main__":
    main()
