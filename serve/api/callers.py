"""Who calls: what one caller's requests share with each other, but not with another's."""

from __future__ import annotations

import hashlib
import ipaddress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from urllib.parse import unquote

from serve.engine.callers import NO_LIMITS, Terms


@dataclass(frozen=True)
class Caller:
    """Who calls."""

    id: str = ""
    """Whose cached prefixes its prompts may reuse; "" if unknown, who shares with nobody."""
    terms: Terms = NO_LIMITS
    """What it may use."""


NOBODY = Caller()

caller: ContextVar[Caller] = ContextVar("caller", default=NOBODY)
"""The caller of the current request."""


def identify(
    authorization: str | bytes,
    peer: str,
    certificate: str = "",
    known: Terms | None = None,
    usual: Terms = NO_LIMITS,
) -> Caller:
    """The caller with these credentials; without any, the host that the call comes from.

    A token that nobody has checked is worth a part of the cache, which only its owner finds again.
    It is not worth a share of the slots: anybody can make up a thousand.

    Args:
        authorization: the header, or "".
        peer: gRPC's name of the other end (``ipv4:192.0.2.1:50000``) or ``HOST:PORT``.
        certificate: whose certificate the caller has shown, or "".
        known: what the owner of the token may use, if it was checked.
        usual: the limits of callers that have none of their own.
    """
    data = authorization.encode() if isinstance(authorization, str) else authorization
    token = "token " + hashlib.sha256(data).hexdigest() if data else ""
    if known is not None:
        account = f"name {known.name}" if known.name else token
        running = usual.running if known.running is None else known.running
        waiting = usual.waiting if known.waiting is None else known.waiting
        return Caller(account, replace(known, account=account, running=running, waiting=waiting))
    account = f"certificate {certificate}" if certificate else f"host {_host(peer)}"
    return Caller(token or account, replace(usual, account=account))


def _host(peer: str) -> str:
    """The host of a peer. An IPv6 network of 64 bits is one: whoever has one of its addresses has
    them all."""
    host = unquote(peer.removeprefix("ipv4:").removeprefix("ipv6:")).rpartition(":")[0] or peer
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
