"""An http(s) URL as browsers read it, encoded for the wire, and the error that says why a URL was not fetched.

The rules are those of the WHATWG's URL standard, which ada implements, with IDNA 2008 for host names (UTS 46).
"""

import re
import string
from dataclasses import dataclass
from typing import Self

from ada_url import URL

from schemas.statuses import REASONS, SampleError

# What needs no encoding (RFC 3986, 2.3): encoded or not, it is the same URL.
_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Of the characters that the standard allows in a host, those that host names and IPv6 addresses have.
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+", re.ASCII)

_DEFAULT_PORTS = {"http": 80, "https": 443}


class FetchError(SampleError):
    """Say why a URL was not fetched.

    ``again``: another try may help right away; by default, where the reason is transient.
    """

    def __init__(
        self, reason: str, detail: str = "", *, again: bool | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(reason, detail)
        self.again = REASONS[reason].transient if again is None else again
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class WebUrl:
    """An http(s) URL as it goes over the wire: ASCII, encoded once, without user name or fragment."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, url: str, base: str | None = None) -> Self:
        """Read a URL as lists and Location headers hold them, relative to ``base`` if given. Raises FetchError."""
        try:
            parts = URL(_scalar_values(url), base)
        except (ValueError, TypeError, AttributeError) as error:
            raise FetchError("bad_url", "not an absolute http(s) URL with a host") from error
        scheme = parts.protocol.removesuffix(":")
        if scheme not in _DEFAULT_PORTS:
            raise FetchError("bad_scheme", scheme)
        # The standard leaves out a port that is the scheme's own.
        port = int(parts.port or _DEFAULT_PORTS[scheme])
        if not port:
            raise FetchError("bad_url", "port 0")
        # Browsers send a bare percent sign as it is, which many servers answer with 400.
        target = _BARE_PERCENT.sub("%25", parts.pathname + parts.search)
        return cls(scheme=scheme, host=_checked_host(parts.hostname), port=port, target=target)

    def join(self, location: str) -> "WebUrl":
        """Return where a Location header of this URL leads. Raises FetchError."""
        return WebUrl.parse(location, str(self))

    @property
    def netloc(self) -> str:
        """The host and, where it is not the scheme's own, the port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.target}"


def canonical_url(url: str) -> str | None:
    """Return the one spelling of all URLs that differ in spelling alone; None for what is not an http(s) URL.

    The URL as it is fetched: scheme and host in lower case and ASCII, without the scheme's own port, user name, dot
    segments and fragment. Besides, percent-encoding as RFC 3986 (6.2.2) has it: none where none is needed, and else in
    upper case. That is not fetched: a server may tell the two apart.
    """
    try:
        fetched = str(WebUrl.parse(url))
    except FetchError:
        return None
    return _ENCODED.sub(_canonical_octet, fetched)


def _canonical_octet(match: re.Match[str]) -> str:
    character = chr(int(match[0][1:], 16))
    return character if character in _UNRESERVED else match[0].upper()


def _scalar_values(text: str) -> str:
    """Replace lone surrogates, which JSON may hold and UTF-8 may not, as browsers do."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_host(host: str) -> str:
    """Return a host as URLs have it: lower-case ASCII, other letters in IDNA, an address short. Raises FetchError."""
    return WebUrl.parse(f"http://[{host}]/" if ":" in host else f"http://{host}/").host


def _checked_host(host: str) -> str:
    host = host.removeprefix("[").removesuffix("]")
    if not _HOST.fullmatch(host):
        raise FetchError("bad_url", f"host {host!r}")
    return host
