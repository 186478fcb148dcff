"""Addresses that a server listens on, and the names under which its web port may be asked."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from ipaddress import ip_address

from retrieval.errors import AddressInUse, CannotListen

ANY_HOST = "*"
LOCAL_NAMES = ("localhost", "ip6-localhost", "ip6-loopback")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on a host."""
    if host in LOCAL_NAMES:
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def joined(host: str, port: int) -> str:
    """Return ``host:port`` as addresses are written, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bound_socket(
    host: str, port: int, *, flag: str = "--port", reuse_port: bool = False
) -> socket.socket:
    """Bind a TCP socket that does not listen yet.

    Args:
        host: Address or name.
        port: 0 picks a free one.
        flag: Of the command, for the message.
        reuse_port: Whether other processes of this server bind the same port.

    Raises:
        CannotListen: The message says why: taken, not this machine's, unknown, not allowed.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
        bound.setblocking(False)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise cannot_listen(joined(host, port), error, flag) from error
    return bound


def cannot_listen(address: str, error: Exception, flag: str = "--port") -> CannotListen:
    """Make the error of an address that cannot be listened on; the message says why."""
    if isinstance(error, socket.gaierror):
        return CannotListen(
            address,
            f"the name does not resolve ({error.strerror}). Give --host an address of this"
            " machine: 127.0.0.1 for itself alone, 0.0.0.0 for all its networks",
        )
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return AddressInUse(address, flag)
    if number == errno.EADDRNOTAVAIL:
        return CannotListen(
            address,
            "this machine has no such address. Give --host one that it has: 127.0.0.1 for itself"
            " alone, 0.0.0.0 for all its networks",
        )
    if number in (errno.EACCES, errno.EPERM):
        return CannotListen(
            address, f"the system does not allow it. Choose a port above 1023 with {flag}"
        )
    return CannotListen(address, f"{error}. Choose another address with --host or {flag}")


class AllowedHosts:
    """Names in the Host header under which the web port answers.

    A page of an attacker whose name is made to resolve to this machine (DNS rebinding) is asked
    for under that name. Allowed are IP addresses, which cannot be rebound, this machine's own
    names, and the names given.

    Args:
        names: Further ones, without a port; ``*`` allows every name.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        own = socket.gethostname()
        self._names = {name.lower().rstrip(".") for name in (*LOCAL_NAMES, own, *names)}

    def allows(self, header: str | None) -> bool:
        """Return whether a Host header is allowed; browsers always send one, probes need not."""
        if header is None or ANY_HOST in self._names:
            return True
        host = header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header
        if not header.startswith("["):
            host = header.partition(":")[0]
        host = host.lower().rstrip(".")
        if host in self._names or host.endswith(".localhost"):
            return True
        try:
            ip_address(host)
        except ValueError:
            return False
        return True
