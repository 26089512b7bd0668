"""Put into every Python process of a server as ``sitecustomize``: no socket reaches farther than this machine.

Whoever tries is noted in the file that ``MSA_TEST_CALLS`` names, and told that the network is down. What libraries do
below Python's own sockets is not seen; vLLM's processes talk over such, but all that it downloads or reports goes
through Python.
"""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address
from typing import Any

NOTES = os.environ.get("MSA_TEST_CALLS")
LOCAL_NAMES = ("", "localhost", "localhost.localdomain", socket.gethostname())


def _is_far(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or name in LOCAL_NAMES:
        return False
    try:
        address = ip_address(name.partition("%")[0])
    except ValueError:
        return True
    return not (address.is_loopback or address.is_unspecified)


def _refuse(host: Any) -> None:
    if NOTES and _is_far(host):
        with open(NOTES, "a") as notes:
            notes.write(f"{host}\n")
        raise OSError(101, f"shut in: {host}")


class _ShutIn(socket.socket):
    def connect(self, address: Any) -> None:
        self._check(address, sends=self.type == socket.SOCK_STREAM)
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        self._check(address, sends=self.type == socket.SOCK_STREAM)
        return super().connect_ex(address)

    def send(self, *data: Any) -> int:
        if self.type == socket.SOCK_DGRAM:
            self._check(self.getpeername(), sends=True)
        return super().send(*data)

    def sendto(self, data: Any, *rest: Any) -> int:
        self._check(rest[-1], sends=True)
        return super().sendto(data, *rest)

    def _check(self, address: Any, sends: bool) -> None:
        # A datagram socket that is connected sends nothing yet: vLLM asks so for its own address.
        if sends and self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse(address[0])


_look_up = socket.getaddrinfo


def _getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
    _refuse(host)
    return _look_up(host, *rest, **options)


if NOTES:
    socket.socket = _ShutIn  # type: ignore[misc]
    socket.getaddrinfo = _getaddrinfo
