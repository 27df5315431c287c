"""What the emission fixed for one served model: limits, token ids, reasoning policy, sampling defaults.

``runtime.json`` beside the tokenizer holds it. The file is written by ``nemobuild.triton.repository`` and read
here, strictly: a key that is missing or unknown stops the server at start, not at the thousandth request.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReasoningPolicy:
    """How a model is told to reason or not, and how it marks its reasoning.

    ``switch`` is ``directive`` (a word in the system message that the template consumes: v1.5),
    ``system_text`` (a fixed first line of the system message: v1) or ``none``.
    """

    switch: str = "none"
    on: str = ""
    off: str = ""
    open_tag: str = ""
    close_tag: str = ""
    tool_open_tag: str = ""
    tool_close_tag: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Token limits of the plan; requests beyond them never reach the engine."""

    max_context_tokens: int
    max_prompt_tokens: int
    default_max_tokens: int
    max_request_bytes: int = 8 << 20
    max_concurrent_requests: int = 256


@dataclass(frozen=True, slots=True)
class Settings:
    model_name: str
    vocab_size: int
    bos_token: str | None
    end_token_ids: tuple[int, ...]
    limits: Limits
    reasoning: ReasoningPolicy = field(default_factory=ReasoningPolicy)
    default_mode: str = "auto"
    sampling_on: Sampling = field(default_factory=Sampling)
    sampling_off: Sampling = field(default_factory=Sampling)
    template_variables: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def load_settings(path: Path) -> Settings:
    """Read ``runtime.json``. Raises ``ValueError`` that names a missing or unknown key."""
    data = json.loads(path.read_text(encoding="utf-8"))
    nested = {"limits": Limits, "reasoning": ReasoningPolicy, "sampling_on": Sampling, "sampling_off": Sampling}
    for key, kind in nested.items():
        if key in data:
            data[key] = _build(kind, data[key], f"{path.name}: {key}")
    data["end_token_ids"] = tuple(data.get("end_token_ids", ()))
    return _build(Settings, data, path.name)


def _build(kind: type[T], data: dict[str, Any], where: str) -> T:
    unknown = data.keys() - {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{where}: unknown key {min(unknown)!r}")
    try:
        return kind(**data)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
