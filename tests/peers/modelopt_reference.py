"""FP8 by ModelOpt: the other road from the same weights and the same tokens, as a program of its own.

It calibrates the model in the folder SRC on the token ids in a JSON file, one sample at a time or in batches of
samples of equal length (padding would enter the statistics), and writes what is asked for. Activations are BF16, as
its users have them, or float32, which shows how much of a difference is BF16's rounding:

    python -m tests.peers.modelopt_reference SRC texts.json OUT --forms hf trtllm --heldout heldout.json

- ``OUT/hf``, ``OUT/trtllm``: its two exports. Either is made from a model of its own, because the TensorRT-LLM one
  equalises the maxima of linears of equal input in place.
- ``OUT/amax.json``: the maximum that each quantizer saw, ``{"model.layers.0.self_attn.q_proj": {"input": ...,
  "weight": ...}, "model.layers.0.self_attn": {"key": ..., "value": ...}}``.
- ``OUT/perplexity.json``: mean negative log likelihood and perplexity of its fake-quantised model, and of the model
  before, over held-out token ids.
- ``OUT/seconds.json``: seconds of each phase.

A program and not a fixture, so that its peak memory can be measured and its warnings stay its own.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

VERSION = "0.47.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("texts", type=Path, help="JSON: a list of lists of token ids")
    parser.add_argument("output", type=Path)
    parser.add_argument("--forms", nargs="*", choices=["hf", "trtllm"], default=["hf", "trtllm"])
    parser.add_argument("--batch", type=int, default=1, help="samples of equal length that go together")
    parser.add_argument("--kv-cache", choices=["fp8", "bf16"], default="fp8")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--heldout", type=Path, help="JSON: token ids to measure perplexity on")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.output.mkdir(parents=True, exist_ok=True)

    heldout = json.loads(options.heldout.read_text()) if options.heldout else []
    phases = Phases()

    import modelopt.torch.export
    import modelopt.torch.quantization  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM

    phases.done("import")
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=getattr(torch, options.dtype)).eval()
    phases.done("load")
    perplexity = {"before": negative_log_likelihood(model, heldout)} if heldout else {}
    phases.done("evaluate")
    quantize(model, json.loads(options.texts.read_text()), options.batch, options.kv_cache == "fp8")
    _write(options.output / "amax.json", read_amax(model))
    phases.done("calibrate")
    if heldout:
        perplexity["fp8"] = negative_log_likelihood(model, heldout)
        _write(options.output / "perplexity.json", perplexity)
        phases.done("evaluate")
    to_bfloat16(model)
    for form in options.forms:
        last = form == options.forms[-1]
        export(model if last else copy.deepcopy(model), form, options.output / form, options.tp, options.pp)
        phases.done(f"export {form}")
    _write(options.output / "seconds.json", phases.seconds)


class Phases:
    """Seconds since the phase before, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.since_s = time.perf_counter()

    def done(self, name: str) -> None:
        now_s = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now_s - self.since_s
        self.since_s = now_s


def quantize(model: Any, texts: Iterable[Sequence[int]], batch: int, kv_fp8: bool) -> None:
    """Static per-tensor FP8 of weights and inputs, and of keys and values where asked: ModelOpt's default recipe."""
    import modelopt.torch.quantization as mtq
    import torch

    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    if kv_fp8:
        config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            for _, group in itertools.groupby(sorted(texts, key=len), key=len):
                equal = list(group)
                for start in range(0, len(equal), batch):
                    model(torch.tensor(equal[start : start + batch]), use_cache=False)

    mtq.quantize(model, config, calibrate)


def to_bfloat16(model: Any) -> None:
    """Parameters only: ``Module.to`` would round the recorded maxima too. Exact, since the files hold BF16."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16


def read_amax(model: Any) -> dict[str, dict[str, float]]:
    """Maximum of each enabled quantizer by module and role; float32 values that JSON keeps exactly."""
    roles = {
        "weight_quantizer": "weight",
        "input_quantizer": "input",
        "k_bmm_quantizer": "key",
        "v_bmm_quantizer": "value",
    }
    found: dict[str, dict[str, float]] = {}
    for name, module in model.named_modules():
        owner, _, last = name.rpartition(".")
        if last in roles and module.is_enabled and getattr(module, "amax", None) is not None:
            found.setdefault(owner, {})[roles[last]] = float(module.amax)
    return found


def export(model: Any, form: str, output: Path, tp: int = 1, pp: int = 1) -> None:
    import torch
    from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint

    with torch.inference_mode():
        if form == "hf":
            export_hf_checkpoint(model, export_dir=output)
        else:
            export_tensorrt_llm_checkpoint(
                model,
                "llama",
                dtype=torch.bfloat16,
                export_dir=output,
                inference_tensor_parallel=tp,
                inference_pipeline_parallel=pp,
            )


def negative_log_likelihood(model: Any, texts: Iterable[Sequence[int]]) -> dict[str, float]:
    """Sum over all next tokens in nats, their number, and perplexity."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text])
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(text) - 1
    return {"nats": total, "tokens": count, "perplexity": float(torch.exp(torch.tensor(total / count)))}


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
