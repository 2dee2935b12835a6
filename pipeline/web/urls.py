"""An http(s) URL parsed and encoded for the wire, and the error that says why a URL was not fetched."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, urljoin, urlsplit

from schemas.statuses import REASONS

# Not encoded: RFC 3986's reserved characters, and ``%``, because a URL that is encoded already stays as it is.
_PATH_SAFE = "/%:@!$&'()*+,;=~-._"
_QUERY_SAFE = _PATH_SAFE + "?[]"
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+", re.ASCII)

_DEFAULT_PORTS = {"http": 80, "https": 443}


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
        return cls(scheme=parts.scheme, host=encode_host(host), port=port, target=target)

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


def encode_host(host: str) -> str:
    """Return a host name in lower-case ASCII, other letters in IDNA. Raises FetchError."""
    try:
        # Python's codec is IDNA 2003: it also takes the emoji domains that IDNA 2008 refuses.
        ascii_host = host if host.isascii() else host.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise FetchError("bad_url", f"host {host!r}: {error}") from error
    if not _HOST.fullmatch(ascii_host):
        raise FetchError("bad_url", f"host {host!r}")
    return ascii_host
