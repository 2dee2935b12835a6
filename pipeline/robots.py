"""What a site reserves: X-Robots-Tag and TDM-Reservation headers, and robots.txt (RFC 9309)."""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote

from pipeline.addresses import FetchError, WebUrl
from schemas.statuses import REASONS

# Directives that take a value, which may itself hold commas and colons (a date); never the name of a robot.
_VALUED = re.compile(r"max-[a-z-]+|unavailable_after")
# A robot's name. A date's ``25-Jun-2010 15`` before its first colon is none, and so is a time of day.
_ROBOT = re.compile(r"\*|[a-z][a-z0-9_.*/-]*")
# ``none`` is short for both.
_SHORT = {"none": ("noindex", "nofollow")}

_CACHED_SITES = 1_000
_FRESH_S = 24 * 3600.0
_FAILED_FRESH_S = 60.0


def product_token(user_agent: str) -> str:
    """Return the name that sites address a robot by: ``capfilt/0.1 (+...)`` is ``capfilt``."""
    return re.split(r"[/\s]", user_agent.strip(), maxsplit=1)[0].lower()


def reserved_by_robots_tag(values: Iterable[str], token: str, directives: Collection[str]) -> str | None:
    """Return the directive of X-Robots-Tag headers that reserves the content for us, or None.

    Args:
        values: one for each header; a header may hold several directives, values with commas and colons
            (``unavailable_after: Sat, 25-Jun-2010 15:00:00 PST``) and names of robots, each of which holds
            for what follows it (``googlebot: nofollow, otherbot: noai``).
        token: our product token, in lower case.
        directives: what counts as a reservation, in lower case.
    """
    for value in values:
        robot = "*"
        for part in re.split(r"[,;]", value.lower()):
            name, colon, rest = (piece.strip(" \t\"'") for piece in part.partition(":"))
            while colon and name not in directives and not _VALUED.fullmatch(name) and _ROBOT.fullmatch(name):
                robot = name.split("/")[0]
                name, colon, rest = (piece.strip(" \t\"'") for piece in rest.partition(":"))
            if robot in ("*", token):
                for directive in (name, *_SHORT.get(name, ())):
                    if directive in directives:
                        return name
    return None


def reserved_by_tdm(values: Iterable[str]) -> bool:
    """Tell whether a TDM-Reservation header says 1."""
    return any(value.strip(" \t\"'") == "1" for value in values)


@dataclass(slots=True)
class RobotRules:
    """The rules of one robots.txt that concern us: (allows, pattern) pairs."""

    rules: list[tuple[bool, str]] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str, token: str) -> "RobotRules":
        """Read a robots.txt: our own groups if it has any, else those of ``*``."""
        groups: dict[str, list[tuple[bool, str]]] = {}
        agents: list[str] = []
        in_rules = False
        for line in text.removeprefix("\ufeff").splitlines():
            name, colon, value = (part.strip() for part in line.partition("#")[0].partition(":"))
            match name.lower():
                case "user-agent" if colon:
                    agents = [*agents, product_token(value)] if not in_rules else [product_token(value)]
                    in_rules = False
                    groups.setdefault(agents[-1], [])
                case "allow" | "disallow" if colon:
                    in_rules = True
                    if value:
                        for agent in agents:
                            groups[agent].append((name.lower() == "allow", value))
        return cls(groups.get(token, groups.get("*", [])))

    def allow(self, target: str) -> bool:
        """Tell whether a path with its query may be fetched: the longest rule that matches decides."""
        path = unquote(target)
        longest, allowed = -1, True
        for allows, pattern in self.rules:
            if len(pattern) >= longest and _matches(unquote(pattern), path):
                # Of two equally long ones, allow wins.
                allowed = allows or (allowed and len(pattern) == longest)
                longest = len(pattern)
        return allowed


def _matches(pattern: str, path: str) -> bool:
    """Match ``*`` with anything and a final ``$`` with the end, in linear time: a site wrote the pattern."""
    anchored = pattern.endswith("$")
    first, *parts = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    for part in parts[:-1]:
        position = path.find(part, position)
        if position < 0:
            return False
        position += len(part)
    if not parts:
        return not anchored or position == len(path)
    if anchored:
        return len(path) - len(parts[-1]) >= position and path.endswith(parts[-1])
    return path.find(parts[-1], position) >= 0


class _Site:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answer: RobotRules | FetchError | None = None
        self.expires = 0.0


class RobotsTxt:
    """Robots.txt of every site, fetched once a day at most.

    As RFC 9309 asks: a client error means that there are no rules; where the site does not answer, or answers
    with a server error, nothing is fetched: the URL fails as its robots.txt did, to be tried another time.
    """

    def __init__(self, token: str) -> None:
        self._token = token
        self._lock = threading.Lock()
        self._sites: OrderedDict[str, _Site] = OrderedDict()

    def check(self, url: WebUrl, get: Callable[[WebUrl], bytes], timeout_s: float) -> None:
        """Raise FetchError where robots.txt forbids the URL; ``get`` fetches one, or raises FetchError."""
        if url.target == "/robots.txt":
            return
        answer = self._answer(url, get, timeout_s)
        if isinstance(answer, FetchError):
            raise FetchError(answer.reason, f"robots.txt: {answer.detail}", again=False)
        if not answer.allow(url.target):
            raise FetchError("robots_txt", f"disallowed for {self._token}")

    def _answer(
        self, url: WebUrl, get: Callable[[WebUrl], bytes], timeout_s: float
    ) -> RobotRules | FetchError:
        site = self._site(f"{url.scheme}://{url.netloc}")
        if not site.lock.acquire(timeout=timeout_s):
            return FetchError("timeout", "another thread still waits for it")
        try:
            if site.answer is None or site.expires < time.monotonic():
                site.answer = self._fetch(url.join("/robots.txt"), get)
                fresh = _FAILED_FRESH_S if isinstance(site.answer, FetchError) else _FRESH_S
                site.expires = time.monotonic() + fresh
            return site.answer
        finally:
            site.lock.release()

    def _fetch(self, url: WebUrl, get: Callable[[WebUrl], bytes]) -> RobotRules | FetchError:
        try:
            return RobotRules.parse(get(url).decode("utf-8", "replace"), self._token)
        except FetchError as error:
            # Not transient: a client error, or a way to it that a guard of ours refuses. There are no rules.
            return error if REASONS[error.reason].transient else RobotRules()

    def _site(self, name: str) -> _Site:
        with self._lock:
            site = self._sites.setdefault(name, _Site())
            self._sites.move_to_end(name)
            if len(self._sites) > _CACHED_SITES:
                self._sites.popitem(last=False)
            return site
