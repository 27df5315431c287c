"""Write the replay repository: the emitted one, with another engine in the place of ``tensorrt_llm``, and two peers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nemobuild.config import EngineConfig
from nemobuild.convert.trtllm import checkpoint_config
from nemobuild.model.hf_config import spec_from_config
from nemobuild.plan.planner import plan
from nemobuild.triton.contract import ENGINE_INPUTS, Tensor, by_name
from nemobuild.triton.pbtxt import Step, TritonModel, render
from nemobuild.triton.repository import RepositoryPlan, plan_repository, write_repository

SPECIAL_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
)
CLOSING_TAG = "</think>"
# The rules of the model family in short: a directive in the first message, and no reasoning when both tags are given.
TEMPLATE = """
{%- set said = messages[0].content if messages[0].role == 'system' else '' -%}
<|begin_of_text|>
{%- for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>
{{- message.content|replace('/no_think', '')|replace('/think', '') }}<|eot_id|>
{%- endfor -%}
<|start_header_id|>assistant<|end_header_id|>{{ '<think>\\n\\n</think>\\n\\n' if '/no_think' in said else '\\n\\n' }}
"""
_ADAPTERS = Path(__file__).resolve().parent / "models"
_TO_ENGINE = ("input_ids", "input_lengths", "request_output_len", "streaming", "exclude_input_in_output")


@dataclass(frozen=True, slots=True)
class Script:
    """What the engine says after a cue. ``reasoning`` is left out when the prompt holds the closing tag already.

    Texts become tokens; ids are said as they are. The end token follows, unless ``loop``.
    """

    answer: str | list[int]
    reasoning: str = ""
    delay_s: float = 0.0
    fail_at: int = -1
    loop: bool = False


def train_tokenizer(texts: Iterable[str], cues: Iterable[str], size: int = 700) -> Tokenizer:
    """Byte-level BPE with few merges, so that many tokens end inside a character. Each cue is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(cue, special=False, normalized=False) for cue in cues])
    return tokenizer


def write_replay(
    target: Path,
    tokenizer: Tokenizer,
    scripts: Mapping[str, Script],
    *,
    template: str = TEMPLATE,
    tokens_per_s: float = 0.0,
    slots: int = 64,
    queue: int = 64,
    max_context_tokens: int = 4096,
) -> Path:
    """``target`` with ``chat`` and ``ensemble`` as emitted, the replay engine, ``stateless`` and ``naive``."""
    config = _model_config(tokenizer, max_context_tokens)
    profile = EngineConfig.model_validate(
        {
            "description": "Replay.",
            "runtime": "cpu",
            "model": {"source": "replay"},
            "limits": {
                "max_batch_size": slots,
                "max_queue_size": queue,
                "max_context_tokens": max_context_tokens,
                "default_max_tokens": max_context_tokens // 2,
            },
            "reasoning": {"policy": "nemotron-super-v1.5", "default": "on"},
        }
    )
    planned = plan(spec_from_config(config), profile, name="replay")
    with tempfile.TemporaryDirectory() as folder:
        source, checkpoint = Path(folder) / "hf", Path(folder) / "checkpoint"
        for made in (source, checkpoint):
            made.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        tokenizer.save(str(source / "tokenizer.json"))
        (source / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": template})
        )
        (checkpoint / "config.json").write_text(json.dumps(checkpoint_config(planned.spec)))
        (checkpoint / "rank0.safetensors").touch()
        files = dict(plan_repository(planned, source, checkpoint).files)
        saved = (source / "tokenizer.json").read_bytes()
        files = {
            name: content.read_bytes() if isinstance(content, Path) else content
            for name, content in files.items()
            if not name.startswith("tensorrt_llm/1/checkpoint/")
        }
    end = tokenizer.token_to_id("<|eot_id|>")
    told = {
        "scripts": {tokenizer.token_to_id(cue): _ids(tokenizer, script, end) for cue, script in scripts.items()},
        "closed": tokenizer.encode(CLOSING_TAG, add_special_tokens=False).ids,
        "tokens_per_s": tokens_per_s,
        "slots": slots,
        "queue": queue,
    }
    files["tensorrt_llm/1/model.py"] = (_ADAPTERS / "tensorrt_llm.py").read_bytes()
    files["tensorrt_llm/1/replay.json"] = json.dumps(told).encode()
    for model in _peers():
        files[f"{model.name}/config.pbtxt"] = render(model).encode()
        adapter = _ADAPTERS / f"{model.name}.py"
        if adapter.exists():
            files[f"{model.name}/1/model.py"] = adapter.read_bytes()
            files[f"{model.name}/1/tokenizer.json"] = saved
        else:
            files[f"{model.name}/1/.keep"] = b""
    return write_repository(RepositoryPlan(files), target)


def _ids(tokenizer: Tokenizer, script: Script, end: int) -> dict[str, Any]:
    reasoning = tokenizer.encode(script.reasoning, add_special_tokens=False).ids
    given = script.answer
    answer = tokenizer.encode(given, add_special_tokens=False).ids if isinstance(given, str) else given
    more = {"delay_s": script.delay_s, "fail_at": script.fail_at, "loop": script.loop}
    return {"reasoning": reasoning, "answer": answer if script.loop else [*answer, end]} | more


def _peers() -> tuple[TritonModel, ...]:
    """Models of the engine era: an ensemble without state, and a front with a thread per request."""
    asked = (Tensor("text_input", "STRING"), Tensor("max_tokens", "INT32"))
    said = (Tensor("text_output", "STRING"),)
    generation = tuple(Tensor(t.name, t.type, t.dims) for t in by_name(ENGINE_INPUTS, _TO_ENGINE))
    tokens = (Tensor("output_ids", "INT32", (-1, -1)), Tensor("sequence_length", "INT32", (-1,)))

    def inner(tensors: tuple[Tensor, ...]) -> dict[str, str]:
        return {tensor.name: f"_{tensor.name}" for tensor in tensors}

    return (
        TritonModel("naive", asked, said, decoupled=True),
        TritonModel("stateless_pre", asked, generation),
        TritonModel("stateless_post", tokens, said),
        TritonModel(
            "stateless",
            asked,
            said,
            steps=(
                Step("stateless_pre", {t.name: t.name for t in asked}, inner(generation)),
                Step("tensorrt_llm", inner(generation), inner(tokens)),
                Step("stateless_post", inner(tokens), {"text_output": "text_output"}),
            ),
        ),
    )


def _model_config(tokenizer: Tokenizer, max_context_tokens: int) -> dict[str, Any]:
    """A Llama of no size worth mentioning: only its vocabulary and context matter here."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": max_context_tokens,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": [tokenizer.token_to_id(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")],
    }
