"""HTTP redirects that lead to this machine or its network are refused.

A list names the addresses of its videos, and whoever serves one of them may answer with a redirect. Followed, it would
fetch from services that only this machine can reach: on itself, on its network, or at a cloud's metadata address.
"""

from __future__ import annotations

import ipaddress
import socket
from contextvars import ContextVar
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

# Whether the request of this task follows a redirect.
_REDIRECTED: ContextVar[bool] = ContextVar("redirected", default=False)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class PrivateRedirectError(PermissionError):
    """A redirect leads to an address that is not on the public internet."""


def is_public(host: str) -> bool:
    """Whether an IP address, as text, is on the public internet; an IPv4 address inside an IPv6 one counts itself."""
    address: Address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inside or address
    return address.is_global and not address.is_multicast


def guard_redirects() -> None:
    """Make every HTTP file system that fsspec opens in this process from here on refuse such redirects.

    A client that is configured for fsspec already stays.
    """
    from fsspec.config import conf

    for scheme in ("http", "https"):
        conf.setdefault(scheme, {}).setdefault("get_client", _client)


def allow_private_redirects() -> None:
    """Follow redirects anywhere, for sources inside a network: ``limits.private_redirects``."""
    from fsspec.config import conf

    for scheme in ("http", "https"):
        conf.setdefault(scheme, {})["get_client"] = _unguarded_client


def _require_public(peer: object) -> None:
    if _REDIRECTED.get() and not (isinstance(peer, tuple) and is_public(str(peer[0]))):
        raise PrivateRedirectError(
            "redirected to an address that is not on the public internet; list that address itself, or set "
            "limits.private_redirects=true"
        )


async def _unguarded_client(**settings: Any) -> aiohttp.ClientSession:
    import aiohttp

    return aiohttp.ClientSession(**settings)


async def _client(**settings: Any) -> aiohttp.ClientSession:
    """fsspec's HTTP client, whose connections are looked at after a redirect, by the address they lead to."""
    import aiohttp

    class Connector(aiohttp.TCPConnector):
        async def connect(self, *arguments: Any, **named: Any) -> Any:
            connection = await super().connect(*arguments, **named)
            try:  # a connection that was open already, perhaps by the address's own name in a list
                transport = connection.transport
                _require_public(None if transport is None else transport.get_extra_info("peername"))
            except PrivateRedirectError:
                connection.close()
                raise
            return connection

    def opened(address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, peer = address
        _require_public(peer)
        return socket.socket(family, kind, protocol)

    async def started(*_: object) -> None:
        _REDIRECTED.set(False)

    async def redirected(session: object, context: SimpleNamespace, parameters: object) -> None:
        _REDIRECTED.set(True)

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(started)
    trace.on_request_redirect.append(redirected)
    return aiohttp.ClientSession(
        connector=Connector(socket_factory=opened),
        **{**settings, "trace_configs": [*settings.get("trace_configs", ()), trace]},
    )
