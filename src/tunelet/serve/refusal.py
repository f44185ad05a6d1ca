"""What a request is refused with: a status and OpenAI's error object. Not for mistakes on the command line (errors.py).

Nothing here repeats what the user wrote but the names of fields and models: messages end up in logs.
"""

from __future__ import annotations

from typing import Any

from tunelet.errors import TuneletError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "overloaded_error"}


class Refusal(Exception):
    """A request that is not answered. param: the field that is to blame; code: OpenAI's name for the reason;
    headers: of the answer (Retry-After, ...)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of(error: TuneletError, param: str | None = None) -> Refusal:
    """400 for a mistake that an engine or a template found. Its fix is for the command line, and left out."""
    return bad(f"{error.what.rstrip('.')}: {error.why}" if error.why else error.what, param)


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """400: the request's own mistake."""
    return Refusal(400, message, param=param, code=code)
