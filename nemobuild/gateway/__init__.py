"""An OpenAI-compatible front over the ``chat`` model: HTTP and server-sent events out, Triton's gRPC in.

A process of its own beside Triton. It holds no model and no tokens: it checks the form of a request, hands the fields
on, and brings what comes back into the form that everyone's client knows. What it does not support it refuses by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """A Triton that answers. ``start`` tells two servers apart that have listened on the same ports."""

    start: int
    grpc_url: str
    metrics_url: str
    assets: str  # folder of the chat model with runtime.json and tokenizer.json


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What the gateway's process needs; plain values, since they travel on its command line."""

    fd: int  # a socket that listens
    control_fd: int  # a socket of whoever started it, see ``versions``
    host: str
    target: Target
    held: bool  # refuse everything, with Retry-After
    api_keys: str | None
    silence_s: float = 300.0  # the longest wait for the next piece of a streamed answer

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> GatewayConfig:
        """From what ``asdict`` gave."""
        return cls(**dict(values) | {"target": Target(**values["target"])})
