"""Plans of the tiny models, for all three runtimes."""

from __future__ import annotations

from typing import Any

from nemobuild.config import EngineConfig
from nemobuild.model.hf_config import spec_from_config
from nemobuild.plan.planner import Plan, plan
from tests.tiny import tiny_config


def planned(runtime: str = "cpu", *, config: dict[str, Any] | None = None, name: str = "tiny", **changes: Any) -> Plan:
    """The plan of ``config`` (default: the tiny model); ``changes`` replace sections of the profile."""
    data: dict[str, Any] = {
        "description": "Tiny.",
        "runtime": runtime,
        "model": {"source": "tiny"},
        "limits": {"max_batch_size": 4, "max_context_tokens": 256, "default_max_tokens": 32},
        "reasoning": {"policy": "nemotron-super-v1.5"},
    }
    if runtime != "cpu":
        data["machine"] = {"gpu": "h100-sxm"}
        data["checkpoint"] = {"format": "hf" if runtime == "llmapi" else "trtllm"}
    profile = EngineConfig.model_validate(data | changes)
    return plan(spec_from_config(config or tiny_config()), profile, name=name)
