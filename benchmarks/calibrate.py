"""Calibration to FP8: memory against the size of the model, and the blocks of the 49B one by one.

1. Two models of equal blocks, the second about four times larger, from BF16 to an FP8 checkpoint by the command
   line: peak resident memory, measured and as stated before the start.
2. Real block shapes of Llama-3.3-Nemotron-Super-49B v1.5 with random weights: one block with attention and FFN width
   28672, one without attention and width 17920. Measured, after a warm-up: seconds of each block at two numbers of
   tokens, seconds to read both without computing, peak memory.
3. Projected from these, and marked so: wall time and memory of the whole 49B with 512 samples of 512 tokens. A block
   takes a constant and a time by parameter and token, and its bytes take a time to be read: on a GPU while the block
   before runs, so the longer of the two counts; on the CPU before it runs, so the sum does.

With ``--device cuda`` the second part runs on a GPU too, where there is one.

    python benchmarks/calibrate.py --dir /path/with/20GB
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

from nemobuild.convert.calibrate import calibrate, plan_calibration
from nemobuild.convert.calibrate_devices import NumpyDevice
from nemobuild.convert.calibrate_state import State
from nemobuild.convert.calibrate_torch import TorchDevice
from nemobuild.convert.quantize import prepare
from nemobuild.convert.samples import default_calibration
from nemobuild.convert.scales import quant_groups
from nemobuild.demo import write_smollm2
from nemobuild.model.hf_config import load_json, load_spec
from nemobuild.places import config_file
from nemobuild.units import format_bytes, format_seconds
from nemobuild.weights.safetensors import layout
from nemobuild.weights.snapshot import Snapshot, open_snapshot

CHILD = "--child"
SIZES = {"1 GiB": 2, "4 GiB": 9}
VOCABULARY = {"vocab_size": 49152, "tie_word_embeddings": True}  # that of the tokenizer of SmolLM2
TEXTS, TEXT_TOKENS = 8, 64
SAMPLE_TOKENS = 512
# Tokens and their cut: the warm-up, and the two runs that give constant and slope.
BLOCK_RUNS = {"cpu": (128, (64, 128, 384)), "cuda": (512, (2048, 8192, 32768))}
PROJECTED_SAMPLES = 512
KNOWN = "super-49b-v1.5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="folder on the disk to work in (default: the system's)")
    parser.add_argument("--device", nargs="+", choices=["cpu", "cuda"], default=["cpu"])
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the JSON and the table")
    parser.add_argument(CHILD, nargs=3, metavar=("SRC", "OUT", "DEVICE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, output, device = options.child
        return _run_blocks(Path(source), Path(output), device)
    machine = harness.machine()
    work = Path(tempfile.mkdtemp(prefix="calibrate-bench-", dir=options.dir))
    try:
        smollm2 = write_smollm2(work / "smollm2", form="llama")
        models = [_whole(work / "model", smollm2, size) for size in SIZES]
        blocks = _blocks(work / "blocks", options.device)
        projected = {device: _project(work / "49b", device, found) for device, found in blocks.items()}
    finally:
        shutil.rmtree(work)
    command = f"python benchmarks/calibrate.py --device {' '.join(options.device)}"
    result = {"command": command, "machine": machine, "models": models, "blocks": blocks, "projected": projected}
    harness.publish("calibrate", result, _table(result), options.results)
    return None


def _whole(folder: Path, tokenizer: Path, size: str) -> dict[str, Any]:
    """Peak memory of calibration and conversion of a model of ``SIZES[size]`` blocks."""
    source, output = folder / "source", folder / "output"
    harness.make_model(source, harness.EIGHT_B | VOCABULARY, SIZES[size])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, source / file)
    texts: dict[str, Any] = {"samples": TEXTS, "tokens_per_sample": TEXT_TOKENS}
    stated = prepare(open_snapshot(source, fp8=True), kv_cache="fp8", calibration=default_calibration(), **texts)
    command = [sys.executable, "-m", "nemobuild", "convert", str(source), "--output", str(output)]
    command += ["--precision", "fp8", "--kv-cache", "fp8"]
    command += ["--samples", str(TEXTS), "--tokens-per-sample", str(TEXT_TOKENS)]
    run = harness.timed(command, folder / "time.txt")
    print(f"  {size}: {run}", file=sys.stderr)
    shutil.rmtree(folder)
    facts = {"model": size, "bytes": stated.conversion.source_bytes, "stated_peak_bytes": stated.peak_memory_bytes}
    return facts | run


def _blocks(folder: Path, devices: list[str]) -> dict[str, Any]:
    """Two blocks of the 49B on every device: seconds of each, peak memory of the process."""
    config = load_json(config_file(KNOWN)) | VOCABULARY | {"bos_token_id": 1, "eos_token_id": 2}
    spec_blocks = config["block_configs"]
    plain = next(b for b in spec_blocks if b["attention"]["no_op"] and b["ffn"]["ffn_mult"] == 3.28125)
    config |= {"num_hidden_layers": 2, "block_configs": [spec_blocks[10], plain]}
    source = harness.make_model(folder / "source", config)
    found = {}
    for device in devices:
        output = folder / f"{device}.json"
        command = [sys.executable, str(Path(__file__).resolve()), CHILD, str(source), str(output), device]
        run = harness.timed(command, folder / "time.txt")
        found[device] = load_json(output) | {"peak_rss_bytes": run["peak_rss_bytes"]}
        print(f"  blocks on {device}: {found[device]}", file=sys.stderr)
    return found


def _run_blocks(source: Path, output: Path, device: str) -> None:
    """In a process of its own: calibrate at each number of tokens, and note how long each block computed."""
    snapshot = open_snapshot(source)
    place = _Timed(TorchDevice(snapshot) if device == "cuda" else NumpyDevice(snapshot))
    cut, runs = BLOCK_RUNS[device]
    for tokens in runs:
        lengths = [min(cut, tokens)] * max(1, tokens // cut)
        plan = plan_calibration(snapshot, lengths, device)
        state = State(output.with_suffix(".state"), {}, resume=False)
        sequences = [[(7 * i + 31 * s) % 49152 for i in range(n)] for s, n in enumerate(lengths)]
        place.seconds.append([])
        for _ in calibrate(snapshot, sequences, plan, state, device=place):
            pass
        state.close()
    begin_s = time.perf_counter()
    for block in place.inner.blocks(0):
        del block  # before the next is read, as calibration does
    read_s = time.perf_counter() - begin_s
    blocks = []
    for i, (few_s, many_s) in enumerate(zip(*place.seconds[1:], strict=True)):
        slope = (many_s - few_s) / (runs[2] - runs[1])
        if slope <= 0:
            raise SystemExit(
                f"Block {i} took {few_s:.1f} s, and {many_s:.1f} s for more tokens: the machine is too busy."
            )
        parameters = _linear_parameters(snapshot, i)
        facts = {"linear_parameters": parameters, "seconds": [few_s, many_s]}
        # A constant below zero would be noise.
        line = {"seconds_per_parameter_token": slope / parameters, "constant_s": max(0.0, few_s - slope * runs[1])}
        blocks.append(facts | line)
    read_bytes = sum(_block_bytes(snapshot, i) for i in range(len(blocks)))
    gpu_bytes = {}
    if device == "cuda":
        import torch

        gpu_bytes = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    found = {
        "blocks": blocks,
        "tokens": runs[1:],
        "read_s": read_s,
        "read_bytes": read_bytes,
        "stated_memory_bytes": plan.memory_bytes,
        "stated_gpu_bytes": plan.device_bytes,
        "peak_gpu_bytes": gpu_bytes,
    }
    output.write_text(json.dumps(found))


class _Timed:
    """A device that notes how long each block is used after it was given out: reading is not in it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seconds: list[list[float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def blocks(self, start: int) -> Iterator[Any]:
        for item in self.inner.blocks(start):
            begin_s = time.perf_counter()
            yield item
            del item
            self.seconds[-1].append(time.perf_counter() - begin_s)


def _block_bytes(snapshot: Snapshot, block: int) -> int:
    return sum(t.nbytes for name, t in snapshot.tensors.items() if name.startswith(f"model.layers.{block}."))


def _linear_parameters(snapshot: Snapshot, block: int) -> int:
    names = (name for names in quant_groups(snapshot.spec, block).values() for name in names)
    return sum(snapshot.tensors[n].shape[0] * snapshot.tensors[n].shape[1] for n in names)


def _project(folder: Path, device: str, found: dict[str, Any]) -> dict[str, Any]:
    """The whole 49B: seconds block by block, memory as the planner states it for its real shapes."""
    snapshot = _headers_only(folder / device)
    plan = plan_calibration(snapshot, [SAMPLE_TOKENS] * PROJECTED_SAMPLES, device)
    with_attention, without = found["blocks"]
    compute_s, read_s = [], []
    for i, kv_heads in enumerate(snapshot.spec.kv_heads_per_block):
        like = with_attention if kv_heads else without
        work = _linear_parameters(snapshot, i) * plan.tokens
        compute_s.append(like["constant_s"] + work * like["seconds_per_parameter_token"])
        read_s.append(_block_bytes(snapshot, i) * found["read_s"] / found["read_bytes"])
    together = max if device == "cuda" else lambda pair: sum(pair)
    return {
        "samples": PROJECTED_SAMPLES,
        "tokens": plan.tokens,
        "seconds": sum(together(pair) for pair in zip(compute_s, read_s, strict=True)),
        "compute_s": sum(compute_s),
        "read_s": sum(read_s),
        "memory_bytes": plan.memory_bytes,
        "gpu_bytes": plan.device_bytes,
        "disk_bytes": plan.disk_bytes,
    }


def _headers_only(folder: Path) -> Snapshot:
    """The 49B as far as planning reads it: files with true headers, the weights being holes."""
    folder.mkdir(parents=True)
    shutil.copyfile(config_file(KNOWN), folder / "config.json")
    file = folder / "model.safetensors"
    shapes = [(name, "BF16", shape) for name, shape in load_spec(folder).tensor_shapes().items()]
    head, tensors = layout(file, shapes, None)
    file.write_bytes(head)
    os.truncate(file, len(head) + sum(t.nbytes for t in tensors.values()))
    return open_snapshot(folder)


def _table(result: dict[str, Any]) -> str:
    lines = [
        [
            format_bytes(m["bytes"]),
            f"{m['seconds']:.1f} s",
            format_bytes(m["peak_rss_bytes"]),
            format_bytes(m["stated_peak_bytes"]),
        ]
        for m in result["models"]
    ]
    table = [
        *harness.heading("Calibration to FP8", result),
        f"Whole runs from BF16 to an FP8 checkpoint, {TEXTS} texts of {TEXT_TOKENS} tokens:",
        "",
        *harness.rows(["model", "time", "peak memory, measured", "stated"], lines),
        *harness.growth(result["models"]),
    ]
    for device, found in result["blocks"].items():
        first, second = found["blocks"]
        lines = [
            [
                name,
                f"{b['linear_parameters'] / 1000000.0:.0f} M",
                *(f"{seconds:.2f} s" for seconds in b["seconds"]),
                f"{2e-12 / b['seconds_per_parameter_token']:.2f}",
            ]
            for name, b in (("attention, FFN 28672", first), ("no attention, FFN 17920", second))
        ]
        memory = f"Peak memory of the host {format_bytes(found['peak_rss_bytes'])}"
        if found["peak_gpu_bytes"]:
            reserved, allocated = (format_bytes(found["peak_gpu_bytes"][x]) for x in ("reserved", "allocated"))
            memory += f", of the GPU {reserved} reserved by torch ({allocated} allocated) beside the context"
        stated = f"{format_bytes(found['stated_memory_bytes'])} beyond the interpreter"
        if found["stated_gpu_bytes"]:
            stated += f", of the GPU {format_bytes(found['stated_gpu_bytes'])} with the context"
        projected = result["projected"][device]
        room = f"memory beyond the interpreter {format_bytes(projected['memory_bytes'])}"
        if projected["gpu_bytes"]:
            room += f", GPU memory {format_bytes(projected['gpu_bytes'])}"
        table += [
            "",
            f"Blocks of the 49B on {device} (measured):",
            "",
            *harness.rows(
                ["block", "linear parameters", *(f"{n} tokens" for n in found["tokens"]), "TFLOP/s between"], lines
            ),
            "",
            f"Reading both again, from the page cache: {found['read_s']:.2f} s, "
            f"{format_bytes(found['read_bytes'] / found['read_s'])}/s.",
            "",
            f"{memory} (measured; stated {stated}).",
            "",
            f"**Projected**, not measured: the whole 49B with {projected['samples']} samples of {SAMPLE_TOKENS} tokens "
            f"takes {format_seconds(projected['seconds'])} ({format_seconds(projected['compute_s'])} of computing, "
            f"{format_seconds(projected['read_s'])} of reading); {room}, "
            f"{format_bytes(projected['disk_bytes'])} of disk while it runs. "
            "Left out: a disk that is slower than the page cache, writing the checkpoint beside it, the tokenizer, and "
            "that long runs have larger batches.",
        ]
    if "cuda" not in result["blocks"]:
        table += ["", "Nothing here ran on a GPU."]
    return "\n".join(table) + "\n"


if __name__ == "__main__":
    main()
