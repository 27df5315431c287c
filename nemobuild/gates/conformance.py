"""Do two runtimes keep the same contract with a client? The same requests to both, and what must not differ.

Two engines may choose other words. The prompt in tokens, which outputs there are, how many, why an answer ended where
the request decides that, and every refusal to the letter are the repository's own work, and must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemobuild.errors import RemoteError, UsageError
from nemobuild.gates.results import Check, Gate
from nemobuild.runtime.settings import ReasoningPolicy
from nemobuild.triton.client import stream

Facts = dict[str, dict[str, Any]]

_ASKED = json.dumps([{"role": "user", "content": "Name a river."}])
_SYSTEM = json.dumps([{"role": "system", "content": "Be brief. สั้น"}, *json.loads(_ASKED)], ensure_ascii=False)
_TOOLS = json.dumps([{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}])
_FIXED = {"min_tokens": 3, "max_tokens": 3}  # so that length and reason are the request's choice, not the model's
_COUNTED = ("prompt_tokens", "completion_tokens", "finish_reason")

# Name -> model, fields. Those with `reasoning_mode` or `tools` are asked where the model has them.
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "streamed": ("chat", {"messages": _ASKED, **_FIXED}),
    "one response": ("chat", {"messages": _ASKED, "stream": False, **_FIXED}),
    "whole": ("ensemble", {"messages": _ASKED, **_FIXED}),
    "raw text": ("chat", {"text_input": "One two three", **_FIXED}),
    "prompt in the output": ("chat", {"text_input": "One two", "exclude_input_in_output": False, **_FIXED}),
    "system message": ("chat", {"messages": _SYSTEM, **_FIXED}),
    "sampled": ("chat", {"messages": _ASKED, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 7, **_FIXED}),
    "penalties": ("chat", {"messages": _ASKED, "repetition_penalty": 1.2, "presence_penalty": 0.5, **_FIXED}),
    "log-probabilities": ("chat", {"messages": _ASKED, "return_log_probs": True, **_FIXED}),
    "stop words": ("chat", {"messages": _ASKED, "stop_words": ["\x00never"], **_FIXED}),
    "reasoning on": ("chat", {"messages": _ASKED, "reasoning_mode": "on", **_FIXED}),
    "reasoning off": ("chat", {"messages": _ASKED, "reasoning_mode": "off", **_FIXED}),
    "tools": ("chat", {"messages": _ASKED, "tools": _TOOLS, **_FIXED}),
    "refused: no tokens": ("chat", {"messages": _ASKED, "max_tokens": 0}),
    "refused: temperature": ("chat", {"messages": _ASKED, "temperature": -1.0}),
    "refused: beams": ("chat", {"messages": _ASKED, "beam_width": 2}),
    "refused: bad messages": ("chat", {"messages": '[{"role": "nobody"}]'}),
    "refused: nothing asked": ("chat", {"max_tokens": 1}),
    "refused: whole, bad top_p": ("ensemble", {"messages": _ASKED, "top_p": 3.0}),
}


def facts(url: str, policy: ReasoningPolicy, *, timeout_s: float = 120.0) -> Facts:
    """What the repository at ``url`` does in every case that fits the policy. Raises ``RemoteError`` without one."""
    found: Facts = {}
    for name, (model, fields) in CASES.items():
        if ("reasoning_mode" in fields and policy.switch == "none") or ("tools" in fields and not policy.tool_open_tag):
            continue
        found[name] = _facts(url, model, fields, timeout_s)
    return found


def gate(this: Facts, that: Facts, elapsed_s: float = 0.0) -> Gate:
    """The gate ``conformance``: a check for every case."""
    checks = []
    for name in this | that:
        mine, theirs = this.get(name, {}), that.get(name, {})
        differ = [what for what in {**theirs, **mine} if mine.get(what) != theirs.get(what)]
        wrong = [f"{what} {theirs.get(what)!r} -> {mine.get(what)!r}" for what in differ]
        checks.append(Check(name, "; ".join(wrong) or "the same", "the same", not wrong))
    return Gate("conformance", tuple(checks), elapsed_s, details={"this": this, "that": that})


def _facts(url: str, model: str, fields: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    try:
        for response in stream(url, fields, model=model, timeout_s=timeout_s):
            for name, value in response.items():
                outputs[name] = outputs[name] + value if isinstance(value, list) and name in outputs else value
    except RemoteError:
        raise
    except UsageError as error:
        return {"refused": error.why}
    lists = {name: len(value) for name, value in outputs.items() if isinstance(value, list)}
    counted = {name: outputs.get(name) for name in _COUNTED}
    return {"outputs": sorted(outputs), **counted, **{f"{name} length": count for name, count in lists.items()}}
