"""The tensors and parameters of the ``tensorrt_llm`` model, as tables: the one contract of all runtimes.

Names, types and shapes are those of the engine-era C++ backend (TensorRT-LLM 1.0 to 1.2.1,
``inflight_batcher_llm/tensorrt_llm/config.pbtxt``). A scalar has dims [1] with an empty reshape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    type: str  # the part after TYPE_ in Triton's enum
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    ragged: bool = False
    scalar: bool = False  # dims [1], reshaped to []


def _scalars(type: str, *names: str) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, type, optional=True, scalar=True) for name in names)


def _ragged(type: str, dims: tuple[int, ...], *names: str) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, type, dims, optional=True, ragged=True) for name in names)


ENGINE_INPUTS: tuple[Tensor, ...] = (
    *_ragged("INT32", (-1,), "input_ids"),
    *(replace(t, optional=False) for t in _scalars("INT32", "input_lengths", "request_output_len")),
    *_scalars("INT32", "beam_width", "runtime_top_k", "runtime_top_p_reset_ids", "min_tokens", "num_return_sequences"),
    *_scalars("FP32", "temperature", "runtime_top_p", "runtime_top_p_min", "runtime_top_p_decay", "len_penalty"),
    *_scalars("FP32", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *_scalars("FP32", "beam_search_diversity_rate", "draft_acceptance_threshold"),
    *_scalars("BOOL", "early_stopping"),
    *_scalars("UINT64", "seed"),
    *_scalars("INT32", "end_id", "pad_id"),
    *_ragged("INT32", (2, -1), "stop_words_list", "bad_words_list"),
    *_ragged("FP32", (-1,), "embedding_bias"),
    *_scalars("BOOL", "stop", "streaming"),
    *_scalars("BOOL", "return_log_probs", "return_context_logits", "return_generation_logits"),
    *_scalars("BOOL", "return_perf_metrics", "exclude_input_in_output"),
    *_ragged("INT32", (-1,), "draft_input_ids"),
    *_ragged("FP32", (-1, -1), "draft_logits"),
    *_ragged("INT32", (1,), "lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size"),
    *_ragged("FP16", (-1, -1), "encoder_input_features"),
    *_scalars("INT32", "encoder_output_lengths"),
    *_ragged("INT32", (-1,), "decoder_input_ids"),
    *_scalars("INT32", "decoder_input_lengths"),
    *_ragged("BOOL", (-1, -1), "cross_attention_mask"),
    *_ragged("BOOL", (1,), "skip_cross_attn_blocks"),
    *_ragged("FP16", (-1, -1), "prompt_embedding_table"),
    *_ragged("UINT64", (-1,), "prompt_table_extra_ids"),
    *_scalars("INT32", "prompt_vocab_size"),
    *_scalars("UINT64", "lora_task_id"),
    *_ragged("FP16", (-1, -1), "lora_weights"),
    *_ragged("INT32", (-1, 3), "lora_config"),
    *_ragged("UINT8", (-1,), "context_phase_params"),
    *_ragged("INT32", (-1,), "retention_token_range_starts", "retention_token_range_ends"),
    *_ragged("INT32", (-1,), "retention_token_range_priorities", "retention_token_range_durations_ms"),
    *_ragged("INT32", (1,), "retention_decode_priority", "retention_decode_duration_ms"),
    *_ragged("STRING", (1,), "guided_decoding_guide_type", "guided_decoding_guide"),
)

ENGINE_OUTPUTS: tuple[Tensor, ...] = (
    Tensor("output_ids", "INT32", (-1, -1)),
    Tensor("sequence_length", "INT32", (-1,)),
    Tensor("cum_log_probs", "FP32", (-1,)),
    Tensor("output_log_probs", "FP32", (-1, -1)),
    Tensor("context_logits", "FP32", (-1, -1)),
    Tensor("generation_logits", "FP32", (-1, -1, -1)),
    Tensor("batch_index", "INT32", (1,)),
    Tensor("sequence_index", "INT32", (1,)),
    Tensor("context_phase_params", "UINT8", (-1,)),
    *(Tensor(f"kv_cache_{n}_blocks", "INT32") for n in ("alloc_new", "reused", "alloc_total")),
    *(Tensor(f"{n}_ns", "INT64") for n in ("arrival_time", "first_scheduled_time", "first_token_time")),
    Tensor("last_token_time_ns", "INT64"),
    Tensor("acceptance_rate", "FP32"),
    Tensor("total_accepted_draft_tokens", "INT32"),
    Tensor("total_draft_tokens", "INT32"),
)

# What preprocessing and chat hand to the engine for one request, and what comes back: the subset in use.
GENERATION_INPUTS: tuple[str, ...] = (
    "input_ids",
    "input_lengths",
    "request_output_len",
    "end_id",
    "pad_id",
    "min_tokens",
    "temperature",
    "runtime_top_k",
    "runtime_top_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop_words_list",
    "bad_words_list",
    "streaming",
    "return_log_probs",
    "exclude_input_in_output",
)
GENERATION_OUTPUTS: tuple[str, ...] = ("output_ids", "sequence_length", "output_log_probs")


def by_name(tensors: tuple[Tensor, ...], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """``tensors`` in the order of ``names``; a name that is not there is a ``KeyError``."""
    table = {tensor.name: tensor for tensor in tensors}
    return tuple(table[name] for name in names)


# Parameters of the C++ backend with the values that do not depend on the plan. Three are read unguarded, so their keys
# must be present although they may be empty.
CPP_PARAMETERS: dict[str, str] = {
    "gpt_model_type": "inflight_fused_batching",
    "gpt_model_path": "tensorrt_llm/1",
    "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
    "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    "tokenizer_dir": "",
    "guided_decoding_backend": "",
    "xgrammar_tokenizer_info_path": "",
    "max_beam_width": "1",
    "batch_scheduler_policy": "guaranteed_no_evict",
    "enable_kv_cache_reuse": "true",
    "enable_chunked_context": "true",
    "exclude_input_in_output": "true",
    "normalize_log_probs": "false",
    "cancellation_check_period_ms": "100",
    "decoding_mode": "top_k_top_p",
}
CPP_PRESENT = ("tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path")
CPP_SET = ("gpt_model_type", "gpt_model_path", "exclude_input_in_output")
CPP_BATCHING = ("inflight_fused_batching", "inflight_batching")
# What else the backend reads. Anything but these is a slip of the pen, which it would not report.
CPP_OPTIONAL: frozenset[str] = frozenset(
    """encoder_model_path max_tokens_in_paged_kv_cache max_attention_window_size sink_token_length
    kv_cache_free_gpu_mem_fraction cross_kv_cache_fraction kv_cache_host_memory_bytes kv_cache_onboard_blocks
    stats_check_period_ms recv_poll_period_ms iter_stats_max_iterations request_stats_max_iterations
    enable_trt_overlap gpu_device_ids participant_ids num_nodes lora_cache_optimal_adapter_size
    lora_cache_max_adapter_size lora_cache_gpu_memory_fraction lora_cache_host_memory_bytes lora_prefetch_dir
    lookahead_window_size lookahead_ngram_size lookahead_verification_set_size medusa_choices eagle_choices
    gpu_weights_percent enable_context_fmha_fp32_acc multi_block_mode cuda_graph_mode cuda_graph_cache_size
    speculative_decoding_fast_logits""".split()
)
