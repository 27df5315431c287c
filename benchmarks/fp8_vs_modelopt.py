"""FP8 by nemobuild against FP8 by NVIDIA ModelOpt on the same CPU: time, peak memory, and what the model still knows.

Both are whole processes from a BF16 folder to an FP8 checkpoint with FP8 KV cache, calibrated on the same tokens:
ours is the command line, theirs ``tests/peers/modelopt_reference.py``, which loads the model in BF16 with
transformers, calibrates, and exports one form. ModelOpt gets token ids and so need not tokenize, and takes samples of
equal length in batches. SmolLM2-135M is calibrated with all texts that ship with nemobuild and with the few of the
peer tests, a synthetic Llama of 1.5 GiB with 16 samples of 256 tokens. Contenders take turns; the tables show medians.

ModelOpt multiplies in BF16, which processors with AVX512-BF16 or AMX do at two to sixteen times the rate of float32;
our calibration is float32, because BF16's rounding alone moves a maximum by up to 2 %. The *floor* is the time that
the float32 products of the blocks take at the rate which NumPy reaches on one large product in the same run: no
float32 calibration on that machine can be faster.

Perplexity is that of the finished checkpoints of SmolLM2, all run by the same FP8 arithmetic, on English prose that
was in no calibration: the language reference inside every Python (``pydoc_data``).

    python benchmarks/fp8_vs_modelopt.py --rounds 3          (in the environment of `make test-peers`)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np

from nemobuild.convert.quality import HeldOutText, measure_quality
from nemobuild.convert.samples import default_calibration, load_samples
from nemobuild.convert.scales import group_of
from nemobuild.convert.verify_models import hf_model, hf_tensors, trtllm_model
from nemobuild.demo import write_smollm2
from nemobuild.model.hf_config import load_json, load_spec
from nemobuild.units import format_bytes

CONTENDERS = ("nemobuild", "modelopt")
FORMS = ("trtllm", "hf")
PERPLEXITY_TOKENS = 256
# Of 1.5 GiB, with the vocabulary of SmolLM2, whose tokenizer it takes.
SYNTHETIC = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 5632,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """A model and how much text it is calibrated with: every ``every``-th text, cut to ``tokens`` tokens."""

    model: str
    tokens: int
    every: int = 1


CASES = {
    "smollm2, all texts": Case("smollm2", 512),
    "smollm2, 27 texts of 96 tokens": Case("smollm2", 96, every=5),
    "synthetic": Case("synthetic", 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="folder on the disk to work in (default: the system's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--perplexity-tokens", type=int, default=20000, help="0 leaves the perplexity out")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the JSON and the table")
    options = parser.parse_args()
    machine = harness.machine() | {"float32_flops": _matrix_rate()}
    work = Path(tempfile.mkdtemp(prefix="fp8-bench-", dir=options.dir))
    try:
        models = {"smollm2": write_smollm2(work / "smollm2", form="llama")}
        models["synthetic"] = _synthetic(work / "synthetic", models["smollm2"])
        cases, perplexity = [], None
        for name in options.cases:
            source, folder = models[CASES[name].model], work / f"case{len(cases)}"
            folder.mkdir()
            texts = _texts(folder, CASES[name])
            cases.append(_measure(name, source, texts, folder, options.forms, options.rounds))
            cases[-1]["floor_s"] = _products(source) * cases[-1]["tokens"] / machine["float32_flops"]
            if perplexity is None and CASES[name].model == "smollm2" and options.perplexity_tokens:
                perplexity = _perplexity(source, folder, options.forms, options.perplexity_tokens)
    finally:
        shutil.rmtree(work)
    command = " ".join(["python benchmarks/fp8_vs_modelopt.py", *sys.argv[1:]])
    result = {"command": command, "machine": machine, "models": cases, "perplexity": perplexity}
    harness.publish("fp8_vs_modelopt", result, _table(result), options.results)


def _synthetic(folder: Path, tokenizer: Path) -> Path:
    harness.make_model(folder, SYNTHETIC)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(tokenizer / file, folder / file)
    return folder


def _texts(folder: Path, case: Case) -> Path:
    """The JSON lines that a case is calibrated with."""
    lines = default_calibration().read_text().splitlines()[:: case.every]
    if case.model == "synthetic":
        lines = [json.dumps({"text": part}) for part in _prose(16 * case.tokens * 8, 16)]  # below 8 letters a token
    file = folder / "texts.jsonl"
    file.write_text("\n".join(lines))
    return file


def _prose(letters: int, parts: int) -> Iterator[str]:
    """The Python language reference, its first ``letters`` in ``parts``."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[key] for key in sorted(topics))[:letters]
    size = len(whole) // parts
    return (whole[i * size : (i + 1) * size] for i in range(parts))


def _matrix_rate() -> float:
    """Float32 operations a second of NumPy on one large product; the best of several."""
    a, b = np.ones((2048, 2048), np.float32), np.ones((2048, 4096), np.float32)
    best_s = float("inf")
    for _ in range(12):
        begin_s = time.perf_counter()
        a @ b
        best_s = min(best_s, time.perf_counter() - begin_s)
    return 2 * 2048 * 2048 * 4096 / best_s


def _products(source: Path) -> int:
    """Float32 operations for one token in the linear layers of all blocks."""
    spec = load_spec(source)
    shapes = spec.tensor_shapes()
    return sum(2 * shapes[name][0] * shapes[name][1] for name in group_of(spec))


def _measure(name: str, source: Path, texts: Path, folder: Path, forms: Sequence[str], rounds: int) -> dict[str, Any]:
    cut = CASES[name].tokens
    ids = [list(s.token_ids) for s in load_samples(texts, source, load_spec(source), tokens_per_sample=cut).samples]
    (folder / "ids.json").write_text(json.dumps(ids))
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {form: {c: [] for c in CONTENDERS} for form in forms}
    for number in range(rounds):
        for form in forms:
            for contender in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
                shutil.rmtree(folder / contender / form, ignore_errors=True)
                os.sync()
                run: dict[str, Any] = harness.timed(
                    _command(contender, form, source, texts, cut, folder), folder / "time.txt"
                )
                if contender == "modelopt":
                    run["phases_s"] = load_json(folder / contender / "seconds.json")
                runs[form][contender].append(run)
                print(f"  {name}, {form}, round {number}: {contender}: {run}", file=sys.stderr)
    return {
        "model": name,
        "bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "samples": len(ids),
        "tokens": sum(map(len, ids)),
        "forms": {form: _summary(found) for form, found in runs.items()},
        "runs": runs,
    }


def _summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = {c: statistics.median(run["seconds"] for run in runs[c]) for c in CONTENDERS}
    peak = {c: max(run["peak_rss_bytes"] for run in runs[c]) for c in CONTENDERS}
    return {
        "median_s": seconds,
        "peak_rss_bytes": peak,
        "times_faster": seconds["modelopt"] / seconds["nemobuild"],
        "memory_ratio": peak["nemobuild"] / peak["modelopt"],
    }


def _command(contender: str, form: str, source: Path, texts: Path, cut: int, folder: Path) -> list[str]:
    output = folder / contender
    if contender == "modelopt":
        program = [sys.executable, "-m", "tests.peers.modelopt_reference", str(source), str(folder / "ids.json")]
        return [*program, str(output), "--forms", form, "--batch", "8"]
    program = [sys.executable, "-m", "nemobuild", "convert", str(source), "--output", str(output / form)]
    choices = {"precision": "fp8", "kv-cache": "fp8", "format": form, "calibration": texts, "tokens-per-sample": cut}
    return [*program, *(str(x) for key, value in choices.items() for x in (f"--{key}", value))]


def _perplexity(source: Path, folder: Path, forms: Sequence[str], tokens: int) -> dict[str, Any]:
    """Of the source, and of both contenders' checkpoints in every form, over ``tokens`` tokens that none has seen."""
    from tokenizers import Tokenizer

    spec = load_spec(source)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = [i for part in _prose(tokens * 6, 16) for i in tokenizer.encode(part, add_special_tokens=False).ids][:tokens]
    texts = [HeldOutText(ids[s : s + PERPLEXITY_TOKENS]) for s in range(0, len(ids) - 1, PERPLEXITY_TOKENS)]
    config = folder / "modelopt" / "trtllm" / "config.json"
    if config.exists():  # ModelOpt leaves the rotary base out, and our reader refuses to guess it
        config.write_text(json.dumps(load_json(config) | {"rotary_base": spec.rope.theta, "rotary_scaling": None}))
    found: dict[str, Any] = {"tokens": len(ids), "forms": {}}
    for form in forms:
        pair = {}
        for contender in CONTENDERS:
            path = folder / contender / form
            model = trtllm_model(path) if form == "trtllm" else hf_model(spec, hf_tensors(path))
            total = measure_quality(hf_model(spec, hf_tensors(source)), model, texts).total
            found["source"] = total.source_perplexity
            pair[contender] = {"perplexity": total.perplexity, "divergence": total.divergence}
        ratio = pair["nemobuild"]["perplexity"] / pair["modelopt"]["perplexity"]
        found["forms"][form] = pair | {"difference": ratio - 1}
    return found


def _table(result: dict[str, Any]) -> str:
    rate = result["machine"]["float32_flops"] / 1e9
    head = [
        "model",
        "tokens",
        "form",
        "nemobuild",
        "floor",
        "ModelOpt",
        "times faster",
        "peak memory",
        "ModelOpt's",
        "ratio",
    ]
    lines = []
    for model in result["models"]:
        for form, row in model["forms"].items():
            ours, theirs = (f"{row['median_s'][c]:.1f} s" for c in CONTENDERS)
            lines.append(
                [
                    f"{model['model']} ({format_bytes(model['bytes'])})",
                    f"{model['tokens']} in {model['samples']}",
                    form,
                    *(ours, f"{model['floor_s']:.1f} s", theirs),
                    f"{row['times_faster']:.2f}",
                    *(format_bytes(row["peak_rss_bytes"][c]) for c in CONTENDERS),
                    f"{row['memory_ratio']:.2f}",
                ]
            )
    table = [
        *harness.heading("FP8: nemobuild against ModelOpt", result),
        f"Medians of whole processes. NumPy's float32 rate, for the floor: {rate:.0f} GFLOP/s.",
        "",
        *harness.rows(head, lines),
    ]
    if found := result["perplexity"]:
        lines = [
            [form, *(f"{row[c]['perplexity']:.3f}" for c in CONTENDERS), f"{row['difference']:+.2%}"]
            + [f"{row[c]['divergence']:.4f}" for c in CONTENDERS]
            for form, row in found["forms"].items()
        ]
        head = ["form", "nemobuild", "ModelOpt", "difference", "KL divergence", "ModelOpt's"]
        table += ["", f"Perplexity of SmolLM2 over {found['tokens']} tokens; in BF16 {found['source']:.3f}.", ""]
        table += harness.rows(head, lines)
    return "\n".join(table) + "\n"


if __name__ == "__main__":
    main()
