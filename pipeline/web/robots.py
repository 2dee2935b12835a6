"""What a site forbids crawlers: X-Robots-Tag and TDM-Reservation headers, and robots.txt (RFC 9309)."""

import io
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from urllib.parse import unquote

from pipeline.web.urls import FetchError, WebUrl
from schemas.statuses import REASONS

# Directives that take a value, which may itself hold commas and colons (a date); never the name of a robot.
_VALUED = re.compile(r"max-[a-z-]+|unavailable_after")
# A robot's name. ``25-Jun-2010 15``, the part of a date before its first colon, does not match, nor does an hour.
_ROBOT = re.compile(r"\*|[a-z][a-z0-9_.*/-]*")
# ``none`` is short for both.
_SHORT = {"none": ("noindex", "nofollow")}

# Letters of a path times wildcards of the rules; bounds a check to a tenth of a second.
_MAX_STEPS = 50_000_000
_CACHED_SITES = 1_000
_FRESH_S = 24 * 3600.0
_FAILED_FRESH_S = 60.0


def product_token(user_agent: str) -> str:
    """Return the name that sites address a robot by: ``capfilt/0.1 (+...)`` is ``capfilt``."""
    return re.split(r"[/\s]", user_agent.strip(), maxsplit=1)[0].lower()


def reserved_by_robots_tag(values: Iterable[str], token: str, directives: Collection[str]) -> str | None:
    """Return the directive of X-Robots-Tag headers that forbids this robot to use the content, or None.

    Args:
        values: one for each header; a header may hold several directives, values with commas and colons
            (``unavailable_after: Sat, 25-Jun-2010 15:00:00 PST``) and names of robots, each of which holds
            for what follows it (``googlebot: nofollow, otherbot: noai``).
        token: the robot's product token, in lower case.
        directives: those that forbid the use, in lower case.
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


class RobotRules:
    """The rules of one robots.txt for one robot.

    Args:
        rules: whether a pattern allows, by pattern.
    """

    def __init__(self, rules: Mapping[str, bool] = MappingProxyType({})) -> None:
        # The longest rule that matches decides; of equally long ones, one that allows.
        self._rules = sorted(rules.items(), key=lambda rule: (-len(rule[0]), not rule[1]))
        self._wildcards = sum(pattern.count("*") for pattern in rules)

    @classmethod
    def parse(cls, text: str, token: str) -> "RobotRules":
        """Read a robots.txt: the groups of ``token`` if it has any, else those of ``*``.

        Only rules of these two are kept, each pattern once: the memory is in proportion to the text, however
        many robots a group names. ``text`` is what bounds their number.
        """
        groups: dict[str, dict[str, bool]] = {}
        # The names, of ``token`` and ``*``, that the current group is for.
        agents: set[str] = set()
        in_rules = False
        for line in io.StringIO(text.removeprefix("\ufeff"), newline=None):
            name, colon, value = (part.strip() for part in line.partition("#")[0].partition(":"))
            match name.lower():
                case "user-agent" if colon:
                    agents = set() if in_rules else agents
                    in_rules = False
                    if (agent := product_token(value)) in (token, "*"):
                        agents.add(agent)
                        groups.setdefault(agent, {})
                case "allow" | "disallow" as verb if colon:
                    in_rules = True
                    for agent in agents if value else ():
                        pattern = unquote(value)
                        # Of two equal patterns, allow wins.
                        groups[agent][pattern] = verb == "allow" or groups[agent].get(pattern, False)
        return cls(groups.get(token, groups.get("*", {})))

    @property
    def memory_bytes(self) -> int:
        """Return about how much memory the rules take."""
        return sum(sys.getsizeof(rule) + sys.getsizeof(rule[0]) for rule in self._rules)

    def allow(self, target: str) -> bool:
        """Tell whether a path with its query may be fetched; one too long to be checked may not."""
        path = unquote(target)
        if self._wildcards * len(path) > _MAX_STEPS:
            return False
        return next((allows for pattern, allows in self._rules if _matches(pattern, path)), True)


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
        self.memory_bytes = 0


class RobotsTxt:
    """Robots.txt of every site, fetched once a day at most.

    As RFC 9309 asks: a client error means that there are no rules; where the site does not answer, or answers
    with a server error, nothing is fetched: the URL fails as its robots.txt did, to be tried another time.

    Args:
        token: the name that sites address this robot by, see ``product_token``.
        max_cached_bytes: of all rules in memory; over it the least recently used sites are fetched again.
    """

    def __init__(self, token: str, max_cached_bytes: int = 50_000_000) -> None:
        self._token = token
        self._max_cached_bytes = max_cached_bytes
        self._lock = threading.Lock()
        self._reading = threading.Lock()
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
                failed = isinstance(site.answer, FetchError)
                site.expires = time.monotonic() + (_FAILED_FRESH_S if failed else _FRESH_S)
                self._bound_cache(site)
            return site.answer
        finally:
            site.lock.release()

    def _fetch(self, url: WebUrl, get: Callable[[WebUrl], bytes]) -> RobotRules | FetchError:
        try:
            text = get(url)
            # One at a time: reading one of the greatest size takes some 20 MB.
            with self._reading:
                return RobotRules.parse(text.decode("utf-8", "replace"), self._token)
        except FetchError as error:
            # Not transient: a client error, or a redirect that is not allowed. By RFC 9309, there are no rules then.
            return error if REASONS[error.reason].transient else RobotRules()

    def _site(self, name: str) -> _Site:
        with self._lock:
            site = self._sites.setdefault(name, _Site())
            self._sites.move_to_end(name)
            return site

    def _bound_cache(self, newest: _Site) -> None:
        """Remove the least recently used sites where the cache is too large."""
        rules = newest.answer
        with self._lock:
            newest.memory_bytes = rules.memory_bytes if isinstance(rules, RobotRules) else 0
            total = sum(site.memory_bytes for site in self._sites.values())
            while self._sites and (len(self._sites) > _CACHED_SITES or total > self._max_cached_bytes):
                total -= self._sites.popitem(last=False)[1].memory_bytes
