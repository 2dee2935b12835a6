"""The guarded fetch: one URL in, one outcome out, whatever the web answers.

Bounds: schemes and addresses (checked at every redirect), number of redirects, header and body bytes, time,
attempts, requests per host. Proxies of the environment are not used: they would connect to addresses that were not
checked.
"""

import contextlib
import random
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import IO

from pipeline.web.bodies import Body, BodyMemory
from pipeline.web.connection import read_body, read_start, request, request_headers
from pipeline.web.dns import Resolver
from pipeline.web.host_limits import HostHealth, HostLimits
from pipeline.web.response import Deadline, Response
from pipeline.web.robots import RobotsTxt, product_token, reserved_by_robots_tag, reserved_by_tdm
from pipeline.web.urls import FetchError, WebUrl
from schemas.config import CrawlConfig
from schemas.statuses import REASONS
from schemas.tables import MAX_DETAIL_CHARS

_DELIVERED = frozenset({200, 203})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_ACCEPT = "image/jpeg, image/png, image/webp, image/*;q=0.8, */*;q=0.5"
# RFC 9309: at least 500 KiB of a robots.txt are read.
_ROBOTS_BYTES = 512_000
# A bug of capfilt's, or a full disk or memory: the shard fails and is retried. All other exceptions of a fetch are
# caused by what the server sent.
_OUR_FAULTS = (AssertionError, OSError, MemoryError)


@dataclass(slots=True, kw_only=True)
class Fetch:
    """How one URL ended. ``body`` is open at its start, and there only where the status is ok."""

    status: str = "failed"
    reason: str | None = None
    detail: str | None = None
    http_status: int | None = None
    attempts: int = 0
    final_url: str | None = None
    content_type: str | None = None
    body: IO[bytes] | None = None
    body_bytes: int | None = None
    sha256: str | None = None
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def end(self, reason: str | None = None, detail: str = "") -> None:
        """Record how it ended: with a reason, or successfully."""
        self.status = "ok" if reason is None else REASONS[reason].status
        self.reason = reason
        self.detail = detail[:MAX_DETAIL_CHARS] or None
        self.seconds = time.monotonic() - self.started

    def pause(self, deadline: Deadline, waited_s: float) -> None:
        """Exclude time in our own queues from the URL's time: the site is not charged for it."""
        deadline.pause(waited_s)
        self.started += waited_s

    def close(self) -> None:
        """Free the body."""
        if self.body is not None:
            self.body.close()
            self.body = None


class Web:
    """Fetches URLs within the bounds of ``[crawl]``. Shared by the threads of one worker.

    Args:
        workers: how many crawl at the same time, until ``share_limits`` is told otherwise. Each keeps to an equal part
            of a host's limits: concurrent requests (at least one) and requests per second.
        spare_lookups: how many look-ups may still be under way after every fetch has given them up.
    """

    def __init__(self, config: CrawlConfig, workers: int = 1, spare_lookups: int = 256) -> None:
        self._config = config
        self.is_in_order, self.threads = False, config.threads
        self._headers = request_headers(user_agent(config), _ACCEPT)
        self._token = product_token(config.user_agent)
        self._directives = {directive.lower() for directive in config.opt_out_directives}
        self._resolver = Resolver(config.allow_hosts, config.threads + spare_lookups, config.nameservers)
        self._limits = HostLimits(config.requests_per_host, config.rate_per_host, workers)
        self._health = HostHealth()
        self._robots = RobotsTxt(self._token) if config.robots_txt else None
        self._tls = ssl.create_default_context()

    def share_limits(self, workers: int) -> None:
        """Keep from now on to the part of one of so many workers."""
        self._limits.share(workers)

    def fetch(self, url: str, memory: BodyMemory | None = None) -> Fetch:
        """Fetch a URL. Nothing that the web does raises; the body is part of ``memory`` until it is closed."""
        memory = memory or BodyMemory()
        config, fetch, deadline = self._config, Fetch(), Deadline(self._config.timeout_s)
        while True:
            try:
                self._try(WebUrl.parse(url), fetch, deadline, memory)
                fetch.end()
                return fetch
            except FetchError as error:
                fault = error
            except _OUR_FAULTS:
                fetch.close()
                raise
            except Exception as error:
                fault = FetchError("bad_response", repr(error), again=False)
            fetch.close()
            fetch.end(fault.reason, fault.detail)
            wait_s = max(self._backoff_s(url, fetch.attempts), fault.retry_after_s)
            if not fault.again or fetch.attempts >= config.max_attempts or not deadline.has(wait_s):
                return fetch
            time.sleep(wait_s)

    def _try(self, url: WebUrl, fetch: Fetch, deadline: Deadline, memory: BodyMemory) -> None:
        """Follow a URL to an image's bytes, once. Raises FetchError."""
        fetch.attempts += 1
        with self._follow(url, fetch, deadline, check_robots=self._robots is not None) as response:
            self._check_opt_out(response)
            body = fetch.body = Body(memory, lambda waited_s: fetch.pause(deadline, waited_s))
            fetch.body_bytes, fetch.sha256 = read_body(response, body, self._config.max_body_bytes)
        if not fetch.body_bytes:
            raise FetchError("empty_body")
        body.seek(0)

    @contextlib.contextmanager
    def _follow(
        self, url: WebUrl, fetch: Fetch, deadline: Deadline, *, check_robots: bool
    ) -> Iterator[Response]:
        """Follow redirects and yield a response that delivers. Raises FetchError."""
        config, visited = self._config, set[WebUrl]()
        while True:
            if url in visited:
                raise FetchError("redirect_loop", str(url))
            if len(visited) > config.max_redirects:
                raise FetchError(
                    "too_many_redirects", f"over crawl.max_redirects ({config.max_redirects}): {url}"
                )
            visited.add(url)
            site = f"{url.host}:{url.port}"
            self._health.check(site)
            # The address is checked first: a robots.txt too is fetched from allowed hosts only.
            lookup_started = time.monotonic()
            lookup = self._resolver.lookup(url)
            fetch.pause(deadline, time.monotonic() - lookup_started)
            patience_s = min(config.connect_timeout_s, deadline.left_s())
            with self._health.watched(site, answers=False):
                addresses = self._resolver.addresses(url, patience_s, lookup)
            if check_robots and self._robots is not None:
                self._robots.check(url, lambda robots: self._robots_txt(robots, deadline), deadline.left_s())
            fetch.final_url = str(url)
            with self._limits.slot(url.host) as waited_s:
                fetch.pause(deadline, waited_s)
                # Checked again: the host may have gone down while this URL waited.
                self._health.check(site)
                with self._health.watched(site), request(
                    url, addresses, self._headers, deadline=deadline, read_timeout_s=config.connect_timeout_s,
                    max_header_bytes=config.max_header_bytes, tls=self._tls,
                ) as response:  # fmt: skip
                    fetch.http_status = response.status
                    fetch.content_type = (response.header("content-type") or "")[:MAX_DETAIL_CHARS] or None
                    if response.status not in _REDIRECTS:
                        _check_status(response)
                        yield response
                        return
                    url = url.join(_location(response))

    def _check_opt_out(self, response: Response) -> None:
        tags = response.headers("x-robots-tag")
        if directive := reserved_by_robots_tag(tags, self._token, self._directives):
            raise FetchError("x_robots_tag", directive)
        if self._config.tdm_reservation and reserved_by_tdm(response.headers("tdm-reservation")):
            raise FetchError("tdm_reservation")

    def _robots_txt(self, url: WebUrl, deadline: Deadline) -> bytes:
        """Fetch the start of a robots.txt within the time of the URL that needs it. Raises FetchError."""
        with self._follow(url, Fetch(), deadline, check_robots=False) as response:
            start = read_start(response, _ROBOTS_BYTES + 1)
        if len(start) <= _ROBOTS_BYTES:
            return start
        # Cut at a line's end: half a line would be another rule.
        end = max(start.rfind(line_end, 0, _ROBOTS_BYTES) for line_end in (b"\n", b"\r"))
        return start[: end + 1]

    def _backoff_s(self, url: str, attempt: int) -> float:
        """Return the wait before the next try: doubling, with jitter that differs by URL but not by run."""
        jitter = random.Random(f"{url} {attempt}").uniform(0.5, 1.5)
        return self._config.backoff_s * 2 ** (attempt - 1) * jitter


def user_agent(config: CrawlConfig) -> str:
    """Return the User-Agent that is sent: the crawler's name and where to reach its operator."""
    return f"{config.user_agent} (+{config.contact})" if config.contact else config.user_agent


def _check_status(response: Response) -> None:
    """Raise FetchError unless the status is 200, or 203: a proxy's 200."""
    code, detail = response.status, f"{response.status} {response.reason}"
    if code == 429:
        raise FetchError("rate_limited", detail, retry_after_s=_retry_after_s(response))
    if 500 <= code < 600:
        raise FetchError("http_5xx", detail, retry_after_s=_retry_after_s(response))
    if code not in _DELIVERED:
        # Some sites refuse robots with 999 and the like: another try does not help.
        raise FetchError("http_4xx" if 400 <= code < 500 else "http_other", detail)


def _location(response: Response) -> str:
    location = response.header("location")
    if not location:
        raise FetchError("bad_response", f"{response.status} without a Location", again=False)
    try:
        # Headers are read as Latin-1; what is not ASCII in a Location is UTF-8 almost everywhere.
        return location.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return location


def _retry_after_s(response: Response) -> float:
    """Return the seconds that Retry-After asks for: a number or a date."""
    value = (response.header("retry-after") or "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = parsedate_to_datetime(value)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0
