"""Tokens per second of the CPU runtime at 1, 2, 4 and 8 streams, on random weights of SmolLM2-135M's shapes.

    python benchmarks/cpu_runtime.py [--precision bf16|fp8] [--layout auto|plain|panels] [--repeats N] [--new-tokens N]

All stream counts are measured in one run, in turns, so that what else the machine does meets all of them. Rates count
the tokens of all streams together: *decode* from the moment when every stream has its first token until the first one
ends, *whole* from the first submission to the last token, prompts included.
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
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from nemobuild.engine.cpu import Chunk, Engine, Generation
from nemobuild.model.e4m3 import encode
from nemobuild.weights.safetensors import ShardWriter

RESULTS = Path(__file__).parent / "results"
STREAMS = (1, 2, 4, 8)
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, WIDTH, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
TARGET = 3.0


def write_checkpoint(folder: Path, *, fp8: bool = False) -> None:
    """A LlamaForCausalLM checkpoint, BF16 or all FP8, with tied embeddings and random weights."""
    config = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_size": HEAD,
        "intermediate_size": WIDTH,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 100000.0,
        "max_position_embeddings": 8192,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    }
    if fp8:
        config["quantization"] = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.vocab_embedding.weight": (VOCAB, HIDDEN),
        "transformer.ln_f.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        shapes |= {
            f"transformer.layers.{i}.input_layernorm.weight": (HIDDEN,),
            f"transformer.layers.{i}.attention.qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
            f"transformer.layers.{i}.attention.dense.weight": (HIDDEN, HEADS * HEAD),
            f"transformer.layers.{i}.post_layernorm.weight": (HIDDEN,),
            f"transformer.layers.{i}.mlp.fc.weight": (WIDTH, HIDDEN),
            f"transformer.layers.{i}.mlp.gate.weight": (WIDTH, HIDDEN),
            f"transformer.layers.{i}.mlp.proj.weight": (HIDDEN, WIDTH),
        }
    rng = np.random.default_rng(0)
    cast = {name for name, shape in shapes.items() if fp8 and len(shape) == 2 and "layers" in name}
    tensors = [(name, "F8_E4M3" if name in cast else "BF16", shape) for name, shape in shapes.items()]
    scales = {name.replace("weight", "weights_scaling_factor"): 1 / 1024 for name in cast}
    scales |= {name.replace("weight", "activation_scaling_factor"): 1 / 64 for name in cast}
    scales |= {n.replace("qkv.weight", "kv_cache_scaling_factor"): 1.0 for n in cast if "qkv" in n}
    writer = ShardWriter(folder / "rank0.safetensors", tensors + [(name, "F32", (1,)) for name in scales])
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        values = values / np.sqrt(np.float32(shape[-1])) if len(shape) == 2 else 1 + 0.1 * values
        if name in cast:
            writer.write(name, encode(values, 1 / 1024).tobytes())
        else:
            writer.write(name, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # cut to BF16
    for name, scale in scales.items():
        writer.write(name, np.float32([scale]).tobytes())
    writer.close()


def measure(engine: Engine, streams: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """(decode, whole) tokens/s of ``streams`` equal requests at once."""
    times: list[list[float]] = [[] for _ in range(streams)]
    done = [threading.Event() for _ in range(streams)]
    rng = np.random.default_rng(streams)
    start = time.perf_counter()
    for i in range(streams):

        def on_chunk(chunk: Chunk, i: int = i) -> None:
            times[i].append(time.perf_counter())
            if chunk.finished:
                if chunk.finish_reason != "length":
                    raise SystemExit(f"a stream ended with {chunk}")
                done[i].set()

        prompt = [int(t) for t in rng.integers(0, VOCAB, prompt_tokens)]
        engine.submit(Generation(prompt, new_tokens, temperature=0.0), on_chunk)
    for event in done:
        event.wait()
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    decoded = sum(begin < t <= end for stream in times for t in stream)
    return decoded / (end - begin), streams * new_tokens / (max(t[-1] for t in times) - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--layout", choices=("auto", "plain", "panels"), default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), fp8=options.precision == "fp8")
        start = time.perf_counter()
        engine = Engine(
            folder,
            max_batch_size=max(STREAMS),
            max_context_tokens=1024,
            kv_cache_tokens=8192,
            max_queue_size=0,
            layout=options.layout,
        )
        load_s = time.perf_counter() - start
    with closing(engine):
        measure(engine, max(STREAMS), 8, 8)  # touch all memory once
        rounds = [
            {n: measure(engine, n, options.prompt_tokens, options.new_tokens) for n in STREAMS}
            for _ in range(options.repeats)
        ]
        layout = "panels" if engine._runner.uses_panels else "plain"
    rates = {n: [statistics.median(r[n][k] for r in rounds) for k in (0, 1)] for n in STREAMS}
    report = {
        "command": shlex.join(["python", "benchmarks/cpu_runtime.py", *sys.argv[1:]]),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "python": f"Python {platform.python_version()}, NumPy {np.__version__}",
        "model": f"random {options.precision.upper()}, {LAYERS} blocks, hidden {HIDDEN}, FFN {WIDTH}, "
        f"vocabulary {VOCAB}, float32 in memory",
        "layout": layout,
        "load_s": round(load_s, 2),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "streams": {
            str(n): {
                "decode_tokens_per_s": round(rates[n][0], 1),
                "whole_tokens_per_s": round(rates[n][1], 1),
                "decode_ratio_to_1": round(rates[n][0] / rates[1][0], 2),
                "whole_ratio_to_1": round(rates[n][1] / rates[1][1], 2),
            }
            for n in STREAMS
        },
        "target_ratio_8_to_1": TARGET,
    }
    text = markdown(report)
    RESULTS.mkdir(exist_ok=True)
    name = "cpu_runtime" if options.precision == "bf16" else f"cpu_runtime_{options.precision}"
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def markdown(report: dict[str, object]) -> str:
    """The report as a page."""
    lines = [
        "# CPU runtime: tokens per second by number of streams",
        "",
        f"`{report['command']}`",
        "",
        f"Model: {report['model']}. Weights held as: {report['layout']}. Loaded in {report['load_s']} s.",
        f"Machine: {report['machine']}; {report['python']}.",
        f"Greedy, prompts of {report['prompt_tokens']} tokens, {report['new_tokens']} new tokens.",
        f"Medians of {report['repeats']} rounds, all stream counts in each round.",
        "",
        "| streams | decode tokens/s | to 1 stream | with prompts tokens/s | to 1 stream |",
        "|---:|---:|---:|---:|---:|",
    ]
    streams = report["streams"]
    assert isinstance(streams, dict)
    for n, row in streams.items():
        lines.append(
            f"| {n} | {row['decode_tokens_per_s']} | {row['decode_ratio_to_1']}x"
            f" | {row['whole_tokens_per_s']} | {row['whole_ratio_to_1']}x |"
        )
    lines += ["", f"Wanted: 8 streams at {report['target_ratio_8_to_1']} times the rate of 1 or more.", ""]
    return "\n".join(lines)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown processor"


if __name__ == "__main__":
    main()
