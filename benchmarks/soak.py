"""Many streams for a long time, with clients that leave, bad requests and budgets: is anything lost, stuck or leaked?

    python benchmarks/soak.py [--minutes 10] [--streams 64] [--tokens-per-s 50]

Each stream asks again and again: mostly for a known text, which must come whole and unmixed; some leave in the middle,
some send what must be refused by its field's name, some have their reasoning cut. At the end every slot must be free.
Resident and shared memory of the server are sampled; their slopes are reported, the first fifth of the time left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.replay.repository import Script, train_tokenizer, write_replay
from benchmarks.replay.texts import SENTENCES, token_streams
from nemobuild.errors import NemobuildError
from nemobuild.triton.client import stream
from nemobuild.triton.server import choose_endpoint, running

RESULTS = Path(__file__).parent / "results"
TEXTS = 16
REPLY = "\n\nDie Antwort: สวัสดี 👩‍👩‍👧‍👦."
# What a stream does, how often in a hundred times.
TURNS = {"text": 60, "leave": 20, "bad": 12, "budget": 8}
BAD = (
    ({"text_input": "<cue0>", "temperature": -1.0}, "temperature"),
    ({"text_input": "<cue0>", "messages": "[]"}, "messages"),
    ({"messages": '[{"role": "robot", "content": "x"}]'}, "messages[0].role"),
    ({"text_input": "<cue0>", "max_tokens": 10**6}, "max_tokens"),
    ({"text_input": "<cue0>", "timeout_ms": 0}, "timeout_ms"),
    ({"text_input": "<cue0>", "beam_width": 4}, "beam_width"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens-per-s", type=float, default=50.0)
    options = parser.parse_args()
    cues = [f"<cue{k}>" for k in range(TEXTS)]
    tokenizer = train_tokenizer(SENTENCES, [*cues, "<reason>"])
    texts = token_streams(tokenizer, TEXTS, 200)
    scripts = {cue: Script(ids) for cue, ids in zip(cues, texts, strict=True)}
    scripts["<reason>"] = Script(REPLY, reasoning="<think>\n" + "".join(SENTENCES) * 3 + "</think>")
    right = dict(zip(cues, (tokenizer.decode(ids) for ids in texts), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        pace = {"tokens_per_s": options.tokens_per_s, "slots": options.streams}
        repository = write_replay(Path(folder) / "repository", tokenizer, scripts, **pace)
        endpoint = choose_endpoint(ports=(0, 0, 0))
        with running(repository, endpoint, Path(folder) / "log") as server:
            soak = Soak(endpoint.grpc_url, right, time.monotonic() + 60 * options.minutes)
            threads = [threading.Thread(target=soak.run, args=(seed,)) for seed in range(options.streams)]
            for thread in threads:
                thread.start()
            samples = []
            while any(thread.is_alive() for thread in threads):
                samples.append((time.monotonic(), *memory_bytes(server.pid, endpoint.grpc_port)))
                time.sleep(1)
            command = shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]])
            report = {"command": command, "minutes": options.minutes, "streams": options.streams}
            report |= {"turns": dict(soak.counts)}
            report |= {"wrong": soak.wrong[:20], "slots_free_after": soak.all_slots_free(options.streams)}
    kept = samples[len(samples) // 5 :]
    for k, name in ((1, "resident"), (2, "shared")):
        slope = np.polyfit([s[0] / 60 for s in kept], [s[k] / 2**20 for s in kept], 1)[0] if len(kept) > 2 else 0.0
        report[f"{name}_mib"] = {"first": kept[0][k] / 2**20, "last": kept[-1][k] / 2**20, "slope_per_min": slope}
    text = json.dumps(report, indent=2, ensure_ascii=False)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.json").write_text(text + "\n")
    print(text)
    raise SystemExit(bool(soak.wrong) or not report["slots_free_after"])


class Soak:
    """What all streams do until ``end``. ``wrong`` holds what must not be."""

    def __init__(self, url: str, right: dict[str, str], end: float) -> None:
        self.url, self.right, self.end = url, right, end
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self.end:
            (turn,) = chance.choices(list(TURNS), list(TURNS.values()))
            try:
                problem = getattr(self, f"_{turn}")(chance)
            except NemobuildError as error:
                problem = str(error)
            self.counts[turn] += 1
            if problem:
                self.wrong.append(f"{turn}: {problem}")

    def all_slots_free(self, slots: int) -> bool:
        """As many requests as there are slots get their answers at once."""
        begin = time.monotonic()
        with ThreadPoolExecutor(slots) as pool:
            problems = list(pool.map(self._text, map(random.Random, range(slots))))
        return not any(problems) and time.monotonic() - begin < 60

    def _text(self, chance: random.Random) -> str:
        cue = chance.choice(list(self.right))
        fields = {"text_input": cue, "max_tokens": 200, "temperature": 0.0}
        text = "".join(r.get("text_output", "") for r in stream(self.url, fields, timeout_s=60))
        return "" if text == self.right[cue] else f"{cue} gave {text[:80]!r}"

    def _leave(self, chance: random.Random) -> str:
        cue = chance.choice(list(self.right))
        pieces, text = stream(self.url, {"text_input": cue, "max_tokens": 200}, timeout_s=60), ""
        for _ in range(chance.randrange(1, 20)):
            text += next(pieces, {}).get("text_output", "")
        pieces.close()
        return "" if self.right[cue].startswith(text) else f"{cue} gave {text[:80]!r}"

    def _bad(self, chance: random.Random) -> str:
        fields, named = chance.choice(BAD)
        try:
            list(stream(self.url, fields, timeout_s=60))
        except NemobuildError as error:
            return "" if f"{named}: " in error.why else f"{named} is not named in {error.why!r}"
        return f"{fields} was not refused"

    def _budget(self, chance: random.Random) -> str:
        budget = chance.randrange(0, 60)
        fields = {"text_input": "<reason>", "max_thinking_tokens": budget, "temperature": 0.0}
        responses = list(stream(self.url, fields, timeout_s=60))
        text = "".join(r.get("text_output", "") for r in responses)
        thought = responses[-1]["reasoning_tokens"]
        fits = text.strip() == REPLY.strip() and thought <= 1.1 * budget + 50
        return "" if fits else f"after {thought} tokens of reasoning: {text[:80]!r}"


def memory_bytes(group: int, port: int) -> tuple[int, int]:
    """Resident memory of a process group without shared pages, and the shared memory that it made."""
    resident, page = 0, os.sysconf("SC_PAGESIZE")
    for statm in Path("/proc").glob("[0-9]*/statm"):
        try:
            fields = (statm.parent / "stat").read_text(errors="replace").rpartition(")")[2].split()
            _, present, shared = map(int, statm.read_text().split()[:3])
        except OSError:
            continue
        if int(fields[2]) == group:
            resident += (present - shared) * page
    regions = Path("/dev/shm").glob(f"nemobuild_*_{port}_*")
    return resident, sum(region.stat().st_blocks * 512 for region in regions)


if __name__ == "__main__":
    main()
