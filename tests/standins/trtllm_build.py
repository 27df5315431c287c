"""A strict stand-in for ``trtllm-build`` of TensorRT-LLM 1.2: same flags, same refusals, same files; no GPU, no engine.

Written from the contract of the real tool and not from the code under test, so that a mistake in one shows in the
other. STANDIN_FAIL makes it fail in one known way, STANDIN_CONFIG changes what it writes into the engine's config.json,
STANDIN_VERSION is its version, STANDIN_SECONDS the time that it takes, STANDIN_ALLOCATE_MIB the memory that it uses,
STANDIN_ENGINE_MIB the size of an engine, STANDIN_CALLS a file that gets one line per call.
"""

import argparse
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

VERSION = os.environ.get("STANDIN_VERSION", "1.2.1")
DTYPES = ["auto", "float16", "float32", "bfloat16", "int32", "disable"]
# name -> (dtypes, default)
PLUGINS = {
    "bert_attention_plugin": (DTYPES, "auto"),
    "gpt_attention_plugin": (DTYPES, "auto"),
    "gemm_plugin": ([*DTYPES, "fp8", "nvfp4"], None),
    "gemm_swiglu_plugin": (["fp8", "disable"], None),
    "fp8_rowwise_gemm_plugin": (DTYPES, None),
    "low_latency_gemm_plugin": (["fp8", "disable"], None),
    "low_latency_gemm_swiglu_plugin": (["fp8", "disable"], None),
    "gemm_allreduce_plugin": (["float16", "bfloat16", "disable"], None),
    "nccl_plugin": (DTYPES, "auto"),
    "lora_plugin": (DTYPES, None),
    "dora_plugin": (DTYPES, None),
    "moe_plugin": (DTYPES, "auto"),
    "mamba_conv1d_plugin": (DTYPES, "auto"),
}
SWITCHES = {
    "context_fmha": True,
    "bert_context_fmha_fp32_acc": False,
    "remove_input_padding": True,
    "norm_quant_fusion": False,
    "reduce_fusion": False,
    "user_buffer": False,
    "use_paged_context_fmha": True,
    "use_fp8_context_fmha": True,
    "fuse_fp4_quant": False,
    "multiple_profiles": False,
    "paged_state": True,
    "streamingllm": False,
    "pp_reduce_scatter": False,
    "use_fused_mlp": True,
}
MAPPING_KEYS = set(
    "world_size rank gpus_per_node cp_size cp_config tp_size pp_size moe_tp_size moe_cluster_size moe_ep_size "
    "attn_tp_size attn_cp_size enable_attention_dp enable_lm_head_tp_in_adp".split()
)
QUANTIZATION_KEYS = set(
    "quant_algo kv_cache_quant_algo group_size smoothquant_val clamp_val use_meta_recipe has_zero_point "
    "pre_quant_scale exclude_modules".split()
)
_LOAD = "[TRT] [E] IRuntime::deserializeCudaEngine: Error Code"
# What the real programs print when they fail so, after the exit status.
FAILURES = {
    "gpu-oom": (1, "[TRT] [E] Error Code 2: OutOfMemory (Requested size was 25769803776 bytes.)"),
    "torch-oom": (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 448.00 MiB."),
    "host-oom": (1, "MemoryError"),
    "worker-killed": (1, "BrokenProcessPool: A process in the process pool was terminated abruptly"),
    "serialization": (
        1,
        f"{_LOAD} 1: Serialization (Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
        "Version tag does not match. Note: Current Version: 240, Serialized Engine Version: 239)",
    ),
    "version": (
        1,
        f"{_LOAD} 6: API Usage Error (The engine plan file is not compatible with this version of TensorRT, "
        "expecting library version 10.14.1.48 got 10.11.0.33, please rebuild.)",
    ),
    "compute": (
        1,
        f"{_LOAD} 6: API Usage Error (The engine plan file is generated on an incompatible device, "
        "expecting compute 8.9 got compute 9.0, please rebuild.)",
    ),
    "library": (
        127,
        "trtllm-build: error while loading shared libraries: libnvinfer.so.10: "
        "cannot open shared object file: No such file or directory",
    ),
    "libcuda": (1, "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory"),
    "module": (1, "Traceback (most recent call last):\nModuleNotFoundError: No module named 'tensorrt_llm'"),
    "driver": (1, "RuntimeError: CUDA driver version is insufficient for CUDA runtime version"),
    "no-kernel": (
        1,
        "[TRT] [E] Error Code 10: Internal Error (Could not find any implementation for node "
        "{ForeignNode[DeciLMForCausalLM/transformer/layers/0/attention/qkv]}.)",
    ),
    "disk": (1, "OSError: [Errno 28] No space left on device"),
    "unknown": (3, "something that nobody has seen before"),
}


def log(text):
    print(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT-LLM] {text}", flush=True)


def arguments():
    parser = argparse.ArgumentParser(prog="trtllm-build")
    for name in "checkpoint_dir model_config build_config model_cls_file model_cls_name visualize_network".split():
        parser.add_argument(f"--{name}")
    parser.add_argument("--output_dir", default="engine_outputs")
    parser.add_argument("--input_timing_cache")
    parser.add_argument("--output_timing_cache", default="model.cache")
    for name, default in {
        "workers": 1,
        "max_batch_size": 2048,
        "max_input_len": 1024,
        "max_num_tokens": 8192,
        "opt_num_tokens": None,
        "max_beam_width": 1,
        "max_encoder_input_len": 1024,
        "max_draft_len": 0,
        "max_lora_rank": 64,
        "tokens_per_block": 32,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max_seq_len", "--max_decoder_seq_len", type=int)
    parser.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int, default=0)
    parser.add_argument("--kv_cache_type", choices=["continuous", "paged", "disabled"], default="paged")
    parser.add_argument("--profiling_verbosity", choices=["layer_names_only", "detailed", "none"])
    parser.add_argument("--log_level", default="info")
    parser.add_argument("--logits_dtype", choices=["float16", "float32"])
    for name in "strip_plan weight_sparsity weight_streaming fast_build enable_debug_output dry_run".split():
        parser.add_argument(f"--{name}", action="store_true")
    for name in "monitor_memory gather_context_logits gather_generation_logits gather_all_token_logits".split():
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--lora_dir", nargs="+")
    parser.add_argument("--lora_ckpt_source", choices=["hf", "nemo"], default="hf")
    parser.add_argument("--lora_target_modules", nargs="+")
    parser.add_argument("--speculative_decoding_mode")
    for name, (dtypes, default) in PLUGINS.items():
        parser.add_argument(f"--{name}", choices=dtypes, default=default)
    for name, default in SWITCHES.items():
        parser.add_argument(f"--{name}", choices=["enable", "disable"], default="enable" if default else "disable")
    return parser.parse_args()


def read_checkpoint(folder):
    config = json.loads((folder / "config.json").read_text())
    for key in "architecture dtype hidden_size num_hidden_layers num_attention_heads max_position_embeddings".split():
        if key not in config:
            raise KeyError(key)
    if config["architecture"] not in ("DeciLMForCausalLM", "LlamaForCausalLM"):
        raise RuntimeError(f"Unsupported model architecture: {config['architecture']}")
    for section, known in (("mapping", MAPPING_KEYS), ("quantization", QUANTIZATION_KEYS)):
        for key in config.get(section, {}):
            if key not in known:
                raise TypeError(f"{section.title()}.__init__() got an unexpected keyword argument '{key}'")
    mapping = config["mapping"]
    assert mapping["world_size"] == mapping.get("tp_size", 1) * mapping.get("pp_size", 1)
    return config


def check_tensors(folder, config, rank):
    """Required but absent tensors stop the real tool; surplus ones do not."""
    with open(folder / f"rank{rank}.safetensors", "rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        found = set(json.loads(stream.read(size))) - {"__metadata__"}
    pp = config["mapping"].get("pp_size", 1)
    stage = rank // config["mapping"].get("tp_size", 1)
    layers = config["layer_configs"]
    counts = [len(layers) // pp + (i < len(layers) % pp) for i in range(pp)]
    mine = layers[sum(counts[:stage]) : sum(counts[: stage + 1])]
    fp8 = config["quantization"].get("quant_algo") == "FP8"
    linears, wanted = [], set()
    for i, layer in enumerate(mine):
        name = f"transformer.layers.{i}"
        attention, ffn = layer["attention"]["impl"], layer["ffn"]["impl"]
        wanted |= {f"{name}.input_layernorm.weight"} if attention != "no_op" else set()
        wanted |= {f"{name}.post_layernorm.weight"} if ffn != "no_op" else set()
        linears += {
            "attention": [f"{name}.attention.qkv", f"{name}.attention.dense"],
            "linear": [f"{name}.attention"],
        }.get(attention, [])
        linears += {"mlp": [f"{name}.ffn.{x}" for x in ("fc", "gate", "proj")], "linear": [f"{name}.ffn"]}.get(ffn, [])
        if attention == "attention" and config["quantization"].get("kv_cache_quant_algo"):
            wanted.add(f"{name}.attention.kv_cache_scaling_factor")
    for linear in linears:
        wanted.add(f"{linear}.weight")
        wanted |= {f"{linear}.weights_scaling_factor", f"{linear}.activation_scaling_factor"} if fp8 else set()
    wanted |= {"transformer.vocab_embedding.weight"} if stage == 0 else set()
    wanted |= {"transformer.ln_f.weight"} if stage == pp - 1 else set()
    if missing := wanted - found:
        raise RuntimeError(f"Required but not provided tensors:{missing}")


def build_config(args, config):
    """BuildConfig after the changes that the real tool makes by itself, each with a warning."""
    quantization = config["quantization"]
    fp8, fp8_kv = quantization.get("quant_algo") == "FP8", quantization.get("kv_cache_quant_algo") == "FP8"
    plugins = {name: getattr(args, name) for name in PLUGINS}
    plugins |= {name: getattr(args, name) == "enable" for name in SWITCHES} | {
        "tokens_per_block": args.tokens_per_block
    }
    for name, value in plugins.items():
        if value == "auto":
            plugins[name] = config["dtype"]
        elif value == "disable":
            plugins[name] = None
    if config["mapping"]["world_size"] == 1:
        plugins["nccl_plugin"] = None
    if fp8_kv and not fp8 and plugins["use_paged_context_fmha"]:
        log("[W] FP8 KV cache without FP8 weights: use_paged_context_fmha is disabled")
        plugins["use_paged_context_fmha"] = False
    if plugins["use_paged_context_fmha"] and plugins["use_fp8_context_fmha"] != fp8_kv and fp8:
        log("[W] use_fp8_context_fmha is set by the KV cache's type")
        plugins["use_fp8_context_fmha"] = fp8_kv
    if not fp8:
        plugins["use_fp8_context_fmha"] = False
    if plugins["reduce_fusion"]:
        log("[W] reduce_fusion is disabled for this architecture")
        plugins["reduce_fusion"] = False
    plugins["paged_state"] = False
    max_seq_len = args.max_seq_len or config["max_position_embeddings"]
    max_num_tokens = args.max_num_tokens
    if max_num_tokens > max_seq_len * args.max_batch_size:
        log("[W] max_num_tokens shouldn't be greater than max_seq_len * max_batch_size")
        max_num_tokens = max_seq_len * args.max_batch_size
    max_num_tokens = max(max_num_tokens, args.tokens_per_block)
    if args.opt_num_tokens is not None and plugins["multiple_profiles"]:
        raise RuntimeError("multiple_profiles is enabled, while opt_num_tokens is set.")
    opt_num_tokens = args.opt_num_tokens
    if opt_num_tokens is None and not plugins["multiple_profiles"]:
        opt_num_tokens = min(args.max_batch_size * args.max_beam_width, max_num_tokens)
    return {
        "max_input_len": args.max_input_len,
        "max_seq_len": max_seq_len,
        "opt_batch_size": 8,
        "max_batch_size": args.max_batch_size,
        "max_beam_width": args.max_beam_width,
        "max_num_tokens": max_num_tokens,
        "opt_num_tokens": opt_num_tokens,
        "max_prompt_embedding_table_size": args.max_prompt_embedding_table_size,
        "kv_cache_type": args.kv_cache_type.upper(),
        "gather_context_logits": args.gather_context_logits,
        "gather_generation_logits": args.gather_generation_logits,
        "strongly_typed": True,
        "force_num_profiles": None,
        "profiling_verbosity": args.profiling_verbosity or "layer_names_only",
        "enable_debug_output": args.enable_debug_output,
        "max_draft_len": args.max_draft_len,
        "speculative_decoding_mode": 1,
        "use_refit": False,
        "input_timing_cache": args.input_timing_cache,
        "output_timing_cache": args.output_timing_cache,
        "lora_config": {"lora_dir": [], "lora_ckpt_source": "hf", "max_lora_rank": 64},
        "weight_sparsity": args.weight_sparsity,
        "weight_streaming": args.weight_streaming,
        "plugin_config": plugins,
        "use_strip_plan": args.strip_plan,
        "max_encoder_input_len": args.max_encoder_input_len,
        "monitor_memory": args.monitor_memory,
        "use_mrope": False,
    }


def pretrained_config(config):
    layers = config["layer_configs"]
    heads = [
        layer["attention"].get("num_key_value_heads") for layer in layers if layer["attention"]["impl"] == "attention"
    ]
    types = [layer["attention"]["impl"] for layer in layers]
    return config | {"layer_types": types, "num_kv_heads_per_layer": heads}


def timings(args):
    """Timings known before and now: the real cache is opaque, and grows."""
    known = set()
    if args.input_timing_cache and os.path.exists(args.input_timing_cache):
        raw = Path(args.input_timing_cache).read_text()
        if not raw.startswith("timings\n"):
            raise RuntimeError("timing cache: magic tag does not match")
        known = set(raw.split("\n")[1:])
    shape = f"{args.max_batch_size}x{args.max_num_tokens}x{args.max_seq_len}"
    log(f"timing cache: {'hit' if shape in known else 'miss'} of {len(known)}")
    Path(args.output_timing_cache).write_text("\n".join(["timings", *sorted(known | {shape})]))


def main():
    args = arguments()
    if calls := os.environ.get("STANDIN_CALLS"):
        with open(calls, "a") as stream:
            stream.write(json.dumps(sys.argv) + "\n")
    log(f"TensorRT-LLM version: {VERSION}")
    fail = os.environ.get("STANDIN_FAIL", "")
    if args.checkpoint_dir is None:
        raise SystemExit("checkpoint_dir is needed")
    if fail in ("library", "libcuda", "module", "driver"):
        status, text = FAILURES[fail]
        print(text, file=sys.stderr)
        raise SystemExit(status)
    checkpoint, output = Path(args.checkpoint_dir), Path(args.output_dir)
    config = read_checkpoint(checkpoint)
    made = build_config(args, config)
    output.mkdir(parents=True, exist_ok=True)
    ballast = bytearray(int(os.environ.get("STANDIN_ALLOCATE_MIB", "0")) << 20)
    ballast[::4096] = b"\1" * len(ballast[::4096])
    for rank in range(config["mapping"]["world_size"]):
        log(f"[I] Building engine of rank {rank}")
        check_tensors(checkpoint, config, rank)
        timings(args)
        if fail == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path(os.environ["STANDIN_PID"]).write_text(str(os.getpid()))
            time.sleep(3600)
        if fail == "hang":
            # A worker that ignores being asked: only the end of the whole session gets it.
            subprocess.Popen(
                ["sh", "-c", "trap '' TERM; echo $$ > \"$0\"; while :; do sleep 1; done", os.environ["STANDIN_PID"]]
            )
            time.sleep(3600)
        if fail == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fail in FAILURES:
            status, text = FAILURES[fail]
            print(text, file=sys.stderr)
            raise SystemExit(status)
        time.sleep(float(os.environ.get("STANDIN_SECONDS", "0")))
        size = int(float(os.environ.get("STANDIN_ENGINE_MIB", "0.05")) * (1 << 20))
        content = b"" if fail == "empty" else b"ftrt" + bytes(size)
        (output / f"rank{rank}.engine").write_bytes(content)
        log(f"[I] Serializing engine to {output}/rank{rank}.engine")
    full = {"version": VERSION, "pretrained_config": pretrained_config(config), "build_config": made}
    for path, value in json.loads(os.environ.get("STANDIN_CONFIG", "{}")).items():
        *sections, field = path.split(".")
        where = full
        for section in sections:
            where = where[section]
        where[field] = value
    if fail != "no-config":
        (output / "config.json").write_text(json.dumps(full, indent=4))
    log("[I] Total time of building all engines: 00:00:00")


if __name__ == "__main__":
    main()
