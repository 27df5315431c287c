"""What a client of the gateway is told when something is wrong: the form of OpenAI, so that its client raises well."""

from __future__ import annotations

from typing import Any

# HTTP status -> the ``type`` of the error object; the others are the server's own fault.
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "unavailable_error"}


class ApiError(Exception):
    """A refusal or a failure. ``param`` is the request's field that is wrong, as the client wrote it."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def as_dict(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(field: str, problem: str) -> ApiError:
    """The request's ``field`` cannot be served."""
    return ApiError(400, f"{field}: {problem}", param=field, code="invalid_value")
