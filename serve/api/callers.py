"""Who calls: what one caller's requests may share with each other, but not with another's."""

from __future__ import annotations

import hashlib
from contextvars import ContextVar

caller: ContextVar[str] = ContextVar("caller", default="")
"""The caller of the current request; "" if unknown, who shares with nobody."""


def identify(authorization: str | bytes, peer: str) -> str:
    """The caller with these credentials; without any, the host that the call comes from.

    Args:
        authorization: the header, or "".
        peer: gRPC's name of the other end (``ipv4:192.0.2.1:50000``) or ``HOST:PORT``.
    """
    data = authorization.encode() if isinstance(authorization, str) else authorization
    if data:
        return "token " + hashlib.sha256(data).hexdigest()
    return "host " + (peer.removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")[0] or peer)
