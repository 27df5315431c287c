"""What ``rebuild`` costs beside its stages: a new revision of the demo model, from a Hub on the loopback.

The stages alone, each by its own function on the same revision: fetch, convert, emit, commit to the store, verify,
compare with the version before, serve and ask both. Then ``nemobuild rebuild`` as a process. And ``rebuild`` once more,
when there is nothing new. Every round has a revision of its own, so that nothing is found in the store.

    python benchmarks/rebuild.py --dir /path/with/10GB --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from harness import ROOT, heading, machine, publish, rows

sys.path.insert(0, str(ROOT))
from nemobuild.config import load_profile
from nemobuild.convert.executor import convert
from nemobuild.demo import write_smollm2
from nemobuild.gates import quality, served
from nemobuild.places import load_plan
from nemobuild.store import Store
from nemobuild.triton.repository import plan_repository, write_repository
from nemobuild.weights import hub
from nemobuild.weights.snapshot import open_snapshot
from tests.hub_server import HubServer, hub_server

REPO, NAME, WEIGHTS = "maker/small-nemotron", "small.yaml", "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="folder for the model and the store; emptied")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    shutil.rmtree(given.dir, ignore_errors=True)
    given.dir.mkdir(parents=True)
    os.chdir(given.dir)
    result: dict[str, Any] = {"command": f"python benchmarks/rebuild.py --rounds {given.rounds}", "machine": machine()}
    profile = yaml.safe_load((ROOT / "engine_configs/profiles/smollm2-nas-cpu.yaml").read_text())
    # The work of the gates is the same in both; their verdict on such small changes is not what is measured.
    profile["gates"] |= {"min_right": 0.0, "max_lost": 99, "max_slowdown": 1.0, "max_wait_increase": 1e9}
    # Few questions, so that the gates, which are the same work in both, do not hide what `rebuild` adds.
    profile["gates"] |= {"prompts": "prompts.yaml", "rounds": 1, "tokens_per_text": 16}
    shipped = yaml.safe_load((ROOT / "engine_configs/gates.yaml").read_text())
    Path("prompts.yaml").write_text(yaml.safe_dump(shipped[:1]))
    Path(NAME).write_text(yaml.safe_dump(profile | {"model": {"source": REPO}}))
    source = write_smollm2(Path("demo"), form="nas")
    files = {file.name: file.read_bytes() for file in source.iterdir() if file.name != "source.json"}
    with hub_server() as server:
        # The library reads its endpoint when it is imported, here at the first fetch.
        os.environ |= {"HF_ENDPOINT": server.endpoint, "NO_PROXY": "127.0.0.1"}
        server.add(REPO, files)
        rebuild()
        found = []
        for number in range(given.rounds):
            stages = alone(server, revision(server, files, 2 * number))
            revision(server, files, 2 * number + 1)
            found.append({"stages": stages, "rebuild_s": rebuild(), "nothing_new_s": rebuild()})
    result["rounds"] = found
    result["ratio"] = median(one["rebuild_s"] / sum(one["stages"].values()) for one in found)
    result["nothing_new_s"] = median(one["nothing_new_s"] for one in found)
    lines = [[name, *(f"{one['stages'][name]:.2f} s" for one in found)] for name in found[0]["stages"]]
    lines += [["sum", *(f"{sum(one['stages'].values()):.2f} s" for one in found)]]
    lines += [["rebuild", *(f"{one['rebuild_s']:.2f} s" for one in found)]]
    lines += [["nothing new", *(f"{one['nothing_new_s']:.2f} s" for one in found)]]
    text = heading("Rebuild of changed weights against the sum of its stages", result)
    text += rows(["", *(f"round {n + 1}" for n in range(len(found)))], lines)
    text += [
        "",
        f"rebuild / sum, median: **{result['ratio']:.3f}**. Nothing new, median: {result['nothing_new_s']:.2f} s.",
    ]
    publish("rebuild", result, "\n".join(text) + "\n")


def revision(server: HubServer, files: dict[str, bytes], number: int) -> str:
    """A commit whose weights differ in the last bit of one value."""
    weights = bytearray(files[WEIGHTS])
    weights[-2 - 2 * number] ^= 1
    return server.add(REPO, files | {WEIGHTS: bytes(weights)})


def rebuild() -> float:
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "nemobuild", "rebuild", NAME, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    json.loads(done.stdout)
    return time.perf_counter() - started_s


def alone(server: HubServer, commit: str) -> dict[str, float]:
    """Seconds of every stage by itself, for ``commit``, beside what is published."""
    shutil.rmtree("alone", ignore_errors=True)
    snapshot, checkpoint, repository = (Path("alone") / name for name in ("snapshot", "checkpoint", "repository"))
    store, profile, last = Store(), load_profile(NAME), Store().current("small")
    assert last is not None
    before = {stage: store.path(stage, key) for stage, key in last.keys.items()}
    kept = Store(Path("alone/store"))
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        started_s = time.perf_counter()
        work()
        found[name] = time.perf_counter() - started_s

    timed("fetch", lambda: hub.fetch(REPO, commit, snapshot, before=before["snapshot"]))
    timed("convert", lambda: convert(open_snapshot(snapshot), checkpoint))
    timed("emit", lambda: write_repository(plan_repository(load_plan(NAME), snapshot, checkpoint), repository))
    for stage, folder in (("snapshot", snapshot), ("checkpoint", checkpoint), ("repository", repository)):
        timed(f"store the {stage}", lambda stage=stage, folder=folder: kept.commit(stage, "0" * 64, folder, {}))
    timed("verify", lambda: quality.verified(checkpoint, snapshot, profile))
    timed(
        "compare with the version before",
        lambda: quality.against_last(checkpoint, snapshot, before["checkpoint"], before["snapshot"], profile),
    )
    both = {"candidate": repository, "before": before["repository"]}
    timed("serve and ask both", lambda: served.put_to_work(both, profile, Path("alone/logs").absolute()))
    return found


if __name__ == "__main__":
    main()
