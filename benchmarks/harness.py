"""What the benchmarks share: synthetic models, timing of whole processes, results beside the programs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemobuild.model.hf_config import spec_from_config
from nemobuild.weights.safetensors import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
SHARD_BYTES = 2 << 30
# The 8B shape with a small vocabulary: 416 MiB a block, 500 MiB for both ends.
EIGHT_B = {
    "model_type": "deci",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


def timed(command: Sequence[str], notes: Path) -> dict[str, float]:
    """Seconds and peak resident bytes of a command. GNU time starts it, so that our own size is not counted.

    What it prints goes to a file beside ``notes``, and is shown when it fails.
    """
    time_tool = shutil.which("time")
    prefix = [time_tool, "-v", "-o", str(notes)] if time_tool else []
    log = notes.with_suffix(".log")
    with log.open("wb") as stream:
        started_s = time.perf_counter()
        process = subprocess.Popen([*prefix, *command], cwd=ROOT, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started_s
    if status:
        raise SystemExit(f"{list(command)} ended with status {status}:\n{log.read_text(errors='replace')[-3000:]}")
    peak_kib = usage.ru_maxrss
    if time_tool:
        line = next(line for line in notes.read_text().splitlines() if "Maximum resident" in line)
        peak_kib = int(line.split()[-1])
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_s, 3), "peak_rss_bytes": peak_kib * 1024}


def machine() -> dict[str, Any]:
    """Of the machine, what the figures depend on. Call it before anything is measured."""
    found = {"cpus": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    return found | {"load_average_before": round(os.getloadavg()[0], 2)}


def publish(name: str, result: Mapping[str, Any], table: str, folder: Path = RESULTS) -> None:
    """Write ``result`` as JSON and ``table`` as Markdown, and show the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    print(table)


def heading(title: str, result: Mapping[str, Any]) -> list[str]:
    """The first lines of a table: what ran, and where."""
    found = result["machine"]
    where = f"{found['cpus']} CPUs, Python {found['python']}, load average before: {found['load_average_before']}"
    return [f"# {title}", "", f"`{result['command']}`; {where}.", ""]


def rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)]


def growth(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much more memory the last model took than the first one, as lines of a table."""
    if len(models) < 2:
        return []
    small, large = models[0], models[-1]
    more = large["peak_rss_bytes"] / small["peak_rss_bytes"] - 1
    return ["", f"A model {large['bytes'] / small['bytes']:.1f} times larger: {more:+.1%} memory."]


def make_model(folder: Path, config: Mapping[str, Any], blocks: int | None = None) -> Path:
    """A BF16 Hugging Face folder with small random weights of the shapes of ``config``, in shards of 2 GiB.

    ``blocks`` repeats one block of eight KV heads that often, in the ``deci`` form.
    """
    if blocks is not None:
        config = {**config, "num_hidden_layers": blocks, "num_key_value_heads_per_layer": [8] * blocks}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    room_bytes = SHARD_BYTES
    for name, shape in spec_from_config(dict(config)).tensor_shapes().items():
        nbytes = 2 * int(np.prod(shape))
        if nbytes > room_bytes and shards[-1]:
            shards.append([])
            room_bytes = SHARD_BYTES
        shards[-1].append((name, "BF16", shape))
        room_bytes -= nbytes
    spread = np.random.default_rng(0).standard_normal(16 << 20, np.float32) * np.float32(0.02)
    noise, ones = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (spread, np.ones(1 << 16, np.float32)))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        writer = ShardWriter(folder / file, tensors, metadata={"format": "pt"})
        for name, info in writer.tensors.items():
            values = ones if len(info.shape) == 1 else noise
            for offset in range(0, info.nbytes, values.nbytes):
                writer.write(name, values[: (info.nbytes - offset) // 2].data, offset)
            weight_map[name] = file
        writer.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
