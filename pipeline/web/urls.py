"""Where a URL may lead: its encoding, its host's addresses, and which of them are never asked.

The address that is checked is the address that is connected to, so that a name which resolves differently the
second time (DNS rebinding) gains nothing.
"""

import contextlib
import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, urljoin, urlsplit

from pipeline.web.dns import Lookup, Lookups, SocketAddress
from schemas.statuses import REASONS

# Left alone by the encoding: RFC 3986's reserved characters, and ``%``, because what is encoded stays so.
_PATH_SAFE = "/%:@!$&'()*+,;=~-._"
_QUERY_SAFE = _PATH_SAFE + "?[]"
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+", re.ASCII)

_DEFAULT_PORTS = {"http": 80, "https": 443}

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


class FetchError(Exception):
    """Say why a URL was not fetched: a reason of ``schemas.statuses``, and what was seen.

    ``again``: another try may help right away; by default, where the reason is transient.
    """

    def __init__(
        self, reason: str, detail: str = "", *, again: bool | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.again = REASONS[reason].transient if again is None else again
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class WebUrl:
    """An http(s) URL as it goes over the wire: ASCII, encoded once, without user name or fragment."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Encode and split a URL as lists and Location headers hold them. Raises FetchError."""
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except (ValueError, AttributeError) as error:
            raise FetchError("bad_url", str(error)) from error
        if parts.scheme and parts.scheme not in _DEFAULT_PORTS:
            raise FetchError("bad_scheme", parts.scheme)
        if not parts.scheme or not host or port == 0:
            raise FetchError("bad_url", "not an absolute http(s) URL with a host")
        target = _encode(parts.path or "/", _PATH_SAFE)
        if parts.query:
            target += "?" + _encode(parts.query, _QUERY_SAFE)
        port = _DEFAULT_PORTS[parts.scheme] if port is None else port
        return cls(scheme=parts.scheme, host=_encode_host(host), port=port, target=target)

    def join(self, location: str) -> "WebUrl":
        """Return where a Location header of this URL leads. Raises FetchError."""
        try:
            return WebUrl.parse(urljoin(str(self), location.strip()))
        except ValueError as error:
            raise FetchError("bad_url", f"Location: {error}") from error

    @property
    def netloc(self) -> str:
        """The host and, where it is not the scheme's own, the port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.target}"


def _encode(text: str, safe: str) -> str:
    return quote(_BARE_PERCENT.sub("%25", text), safe=safe, errors="surrogatepass")


def _encode_host(host: str) -> str:
    try:
        # Python's codec is IDNA 2003: it also takes the emoji domains that IDNA 2008 refuses.
        ascii_host = host if host.isascii() else host.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise FetchError("bad_url", f"host {host!r}: {error}") from error
    if not _HOST.fullmatch(ascii_host):
        raise FetchError("bad_url", f"host {host!r}")
    return ascii_host


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


class Resolver:
    """Turns a URL's host into addresses that may be connected to.

    Args:
        allow_hosts: ``host:port`` entries whose addresses are not checked.
        lookups_at_once: see ``Lookups``.
    """

    def __init__(self, allow_hosts: Collection[str] = (), lookups_at_once: int = 320) -> None:
        self._allowed = {_allowed_site(entry) for entry in allow_hosts}
        self._lookups = Lookups(lookups_at_once)

    def lookup(self, url: WebUrl) -> Lookup:
        """Return the look-up of the host, begun now unless there is one. Raises FetchError."""
        try:
            return self._lookups.of(url.host, url.port)
        except TimeoutError as error:
            raise FetchError("dns", str(error), again=False) from error

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
                    raise FetchError(
                        "forbidden_address",
                        f'{url.host} is {address[0]}; crawl.allow_hosts = ["{_site(url)}"] would exempt it',
                    )
        return addresses


def _site(url: WebUrl) -> str:
    return f"[{url.host}]:{url.port}" if ":" in url.host else f"{url.host}:{url.port}"


def _allowed_site(entry: str) -> str:
    """Return an entry of crawl.allow_hosts in the form of ``_site``; an IPv6 address may lack its brackets."""
    host, _, port = entry.lower().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    with contextlib.suppress(FetchError):
        host = _encode_host(host)
    return f"[{host}]:{int(port)}" if ":" in host else f"{host}:{int(port)}"
