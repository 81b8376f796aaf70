"""Who calls: what one caller's requests may share with each other, but not with another's."""

from __future__ import annotations

import hashlib
from contextvars import ContextVar

caller: ContextVar[str] = ContextVar("caller", default="")
"""The caller of the current request; "" if unknown, who shares with nobody."""


def identify(authorization: str | bytes) -> str:
    """The caller with these credentials; without any, nobody in particular."""
    data = authorization.encode() if isinstance(authorization, str) else authorization
    return hashlib.sha256(data).hexdigest() if data else ""
