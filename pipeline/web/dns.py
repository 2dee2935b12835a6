"""The addresses of a URL's host: looked up with a time limit, and checked against private and reserved networks.

getaddrinfo has no time limit and cannot be stopped: for a name whose servers are silent it takes half a minute.
So each look-up runs in a thread of its own; a fetch waits for it as long as for a connection, and then fails while
the thread ends by itself. Until then the name is not looked up again, and every fetch that needs it fails at once.
The address that is checked is the address that is connected to, so that a name which resolves differently the
second time (DNS rebinding) gains nothing.
"""

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any

from pipeline.web.urls import FetchError, WebUrl, encode_host

SocketAddress = tuple[socket.AddressFamily, Any]
Ask = Callable[[str, int], list[SocketAddress]]

_ANSWER_FRESH_S = 300.0
_FAILURE_FRESH_S = 60.0
# A temporary failure that took longer has had its second try, by the system's resolver.
_QUICK_S = 2.0
_CACHED_NAMES = 50_000
_ROOM_TIMEOUT_S = 60.0

_FORBIDDEN_NETWORKS = tuple(
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata server is 192.0.0.192
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's metadata server, on a public address
        "2001::/23",  # Teredo and other protocol assignments
        "2001:db8::/32",
        "2002::/16",  # 6to4: any IPv4 address inside
        "3fff::/20",
    )
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _ask_system(host: str, port: int) -> list[SocketAddress]:
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in infos]


def _ask_servers(servers: Sequence[str]) -> Ask:
    # Imported where it is wanted.
    from pipeline.web.nameservers import NameServers

    asked = NameServers(servers).addresses

    def ask(host: str, port: int) -> list[SocketAddress]:
        # An address is no name: nobody need be asked.
        return _ask_system(host, port) if _is_address(host) else asked(host, port)

    return ask


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Lookup:
    """The look-up of one name, shared by all fetches that need it."""

    def __init__(self) -> None:
        self._answer: Future[list[SocketAddress]] = Future()
        self._started = time.monotonic()
        self._seconds = 0.0

    def run(self, ask: Ask, host: str, port: int) -> None:
        """Ask for the addresses."""
        try:
            addresses = ask(host, port)
        except Exception as error:
            self._seconds = time.monotonic() - self._started
            self._answer.set_exception(error)
        else:
            self._seconds = time.monotonic() - self._started
            self._answer.set_result(addresses)

    def result(self, timeout_s: float) -> list[SocketAddress]:
        """Return the addresses.

        Raises TimeoutError once ``timeout_s`` have passed since the look-up began, however late this is called; or
        what getaddrinfo raised.
        """
        try:
            return self._answer.result(max(0.0, self._started + timeout_s - time.monotonic()))
        except TimeoutError:
            raise TimeoutError(f"no answer within {timeout_s:.3g} s") from None

    @property
    def under_way(self) -> bool:
        """Tell whether there is no answer yet."""
        return not self._answer.done()

    @property
    def worth_another(self) -> bool:
        """Tell whether it failed quickly and temporarily, so that another try right away may succeed."""
        error = None if self.under_way else self._answer.exception()
        temporary = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        return temporary and self._seconds < _QUICK_S

    @property
    def fresh(self) -> bool:
        """Tell whether the answer, or the wait for it, may be reused."""
        if self.under_way:
            return True
        kept_s = _ANSWER_FRESH_S if self._answer.exception() is None else _FAILURE_FRESH_S
        return not self.worth_another and time.monotonic() < self._started + self._seconds + kept_s


class Resolver:
    """Turns a URL's host into addresses that may be connected to; shared by the threads of one worker.

    Args:
        allow_hosts: ``host:port`` entries whose addresses are not checked.
        at_once: how many look-ups may be under way, those that every fetch has given up included.
        nameservers: DNS servers to ask instead of the system's resolver.
    """

    def __init__(
        self, allow_hosts: Collection[str] = (), at_once: int = 320, nameservers: Sequence[str] = ()
    ) -> None:
        self._ask = _ask_servers(nameservers) if nameservers else _ask_system
        self._allowed = {_allowed_site(entry) for entry in allow_hosts}
        self._at_once = at_once
        self._room = threading.Semaphore(at_once)
        self._lock = threading.Lock()
        self._lookups: dict[tuple[str, int], Lookup] = {}

    def lookup(self, url: WebUrl) -> Lookup:
        """Return the look-up of the host, begun now unless there is one. Raises FetchError: too many are under way."""
        name = (url.host, url.port)
        if (known := self._lookups.get(name)) is not None and known.fresh:
            return known
        if not self._room.acquire(timeout=_ROOM_TIMEOUT_S):
            detail = f"not looked up: {self._at_once} names of other hosts do not answer"
            raise FetchError("dns", detail, again=False)
        with self._lock:
            # Another thread may have begun it meanwhile.
            if (known := self._lookups.get(name)) is not None and known.fresh:
                self._room.release()
                return known
            if len(self._lookups) >= _CACHED_NAMES:
                self._lookups = {name: lookup for name, lookup in self._lookups.items() if lookup.under_way}
            lookup = self._lookups[name] = Lookup()
        thread = threading.Thread(target=self._run, args=(lookup, *name), name="dns", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left: wait for the answer here
            self._run(lookup, *name)
        return lookup

    def _run(self, lookup: Lookup, host: str, port: int) -> None:
        try:
            lookup.run(self._ask, host, port)
        finally:
            self._room.release()

    def addresses(self, url: WebUrl, timeout_s: float, lookup: Lookup | None = None) -> list[SocketAddress]:
        """Return the host's addresses, each checked: one bad one refuses the host. Raises FetchError."""
        lookup = lookup or self.lookup(url)
        try:
            addresses = lookup.result(timeout_s)
        except TimeoutError as error:
            raise FetchError("dns", str(error), again=False) from error
        except socket.gaierror as error:
            raise FetchError("dns", str(error), again=lookup.worth_another) from error
        except (UnicodeError, OSError) as error:
            raise FetchError("bad_url", f"host {url.host!r}: {error}") from error
        if _site(url) not in self._allowed:
            for _, address in addresses:
                if is_forbidden(address[0]):
                    named = "" if address[0] == url.host else f" is {address[0]}, which"
                    raise FetchError(
                        "forbidden_address",
                        f"{url.host}{named} is not a public address; crawl.allow_hosts = "
                        f'["{_site(url)}"] would exempt it',
                    )
        return addresses


def _site(url: WebUrl) -> str:
    return f"[{url.host}]:{url.port}" if ":" in url.host else f"{url.host}:{url.port}"


def _allowed_site(entry: str) -> str:
    """Return an entry of crawl.allow_hosts in the form of ``_site``; an IPv6 address may lack its brackets."""
    host, _, port = entry.lower().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    with contextlib.suppress(FetchError):
        host = encode_host(host)
    return f"[{host}]:{int(port)}" if ":" in host else f"{host}:{int(port)}"


def is_forbidden(text: str) -> bool:
    """Tell whether an IP address is anything but a public unicast one (metadata servers are not)."""
    address = ipaddress.ip_address(text)
    if address.version == 6:
        if address.ipv4_mapped is not None:
            return is_forbidden(str(address.ipv4_mapped))
        if address in _NAT64:
            return is_forbidden(str(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)))
        if address not in _GLOBAL_UNICAST:
            return True
    elif not address.is_global or address.is_multicast or address.is_reserved:
        return True
    return any(address in network for network in _FORBIDDEN_NETWORKS)
