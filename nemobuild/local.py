"""Ask what we started ourselves on this machine: never by way of a proxy that the environment names."""

from __future__ import annotations

import os
import urllib.request
from http.client import HTTPResponse

# gRPC would go on working in a child between fork and exec, which now and then ends the child before it is a program.
# Ours become one at once; read by gRPC when it is first imported. See https://github.com/grpc/grpc/issues/43055
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# The same for channels of gRPC, with messages of any length.
DIRECT_CHANNEL = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


def open_local(url: str, timeout_s: float) -> HTTPResponse:
    """The response to a GET. Raises ``OSError``, also for a status that is an error."""
    response: HTTPResponse = _OPENER.open(url, timeout=timeout_s)
    return response
