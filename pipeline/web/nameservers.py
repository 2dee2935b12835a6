"""DNS servers of one's own choice in place of the system's: whoever crawls millions of hosts asks a resolver for it."""

import socket
from collections.abc import Sequence
from typing import Any

import dns.exception
import dns.nameserver
import dns.resolver

from schemas.names import name_server

_SECONDS, _SECONDS_A_SERVER = 30.0, 3.0


class NameServers:
    """Asks some DNS servers, in random order, the next one where one does not answer. Safe to use from many threads.

    Args:
        servers: IP addresses, each with a port (``10.0.0.2:5353``, ``[::1]:5353``) or without one.
        seconds: of a whole look-up, further servers included; a fetch waits no longer than for a connection.
        seconds_a_server: before the next one is asked.
    """

    def __init__(
        self, servers: Sequence[str], seconds: float = _SECONDS, seconds_a_server: float = _SECONDS_A_SERVER
    ) -> None:
        self._resolver = dns.resolver.Resolver(configure=False)
        self._resolver.nameservers = [
            dns.nameserver.Do53Nameserver(*name_server(server)) for server in servers
        ]
        self._resolver.rotate = True
        self._resolver.timeout, self._resolver.lifetime = seconds_a_server, seconds

    def addresses(self, host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
        """Return the socket addresses of a host, IPv6 ones too. Raises socket.gaierror as getaddrinfo does."""
        try:
            # Not resolve_name: it gives up after the first server's time.
            answers = {
                family: self._resolver.resolve(host, kind, search=False, raise_on_no_answer=False)
                for family, kind in ((socket.AF_INET, "A"), (socket.AF_INET6, "AAAA"))
            }
        except dns.resolver.NXDOMAIN as error:
            raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
        except dns.exception.DNSException as error:
            raise socket.gaierror(socket.EAI_AGAIN, str(error)) from error
        addresses = [
            (family, record.address) for family, answer in answers.items() for record in answer.rrset or ()
        ]
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, f"{host} has no address")
        return [
            (family, (address, port) if family == socket.AF_INET else (address, port, 0, 0))
            for family, address in addresses
        ]
