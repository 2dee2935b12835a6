"""A corpus's page in tests: a server on loopback in a thread, and HTML read as a browser's parser would."""

import asyncio
import contextlib
import http.client
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode, urlsplit

from jobs.look.server import Server, serve
from pipeline.manifest.manifest import Manifest
from pipeline.storage.storage import Storage


@dataclass
class Part:
    """A section of a page: the numbers it shows, in order, and the SQL printed in it."""

    name: str
    numbers: list[float] = field(default_factory=list)
    sql: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """A page's tags with their attributes, its text, and its parts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.parts: list[Part] = []
        self._in_code = self._is_open = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append((tag, values))
        if "data-part" in values:
            self.parts.append(Part(values["data-part"]))
        if tag == "data":
            self.parts[-1].numbers.append(float(values["value"]))
        if tag == "pre":
            self._in_code = True
            self._command = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self._in_code = False
            if self.parts:
                self.parts[-1].sql.append(shlex.split(self._command)[-1])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_code:
            self._command += data

    def links(self) -> list[str]:
        """Return every address that the page names."""
        names = ("href", "src", "action", "srcset", "data", "poster", "formaction", "background")
        return [values[name] or "" for _, values in self.tags for name in names if name in values]


@dataclass
class Site:
    """A served corpus: ``get`` asks it for a path below its address."""

    address: str

    def get(self, path: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body; a path that begins with ``/`` is taken from the root, as it is."""
        parts = urlsplit(self.address)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path if path.startswith("/") else parts.path + path, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def post(self, path: str, form: dict[str, str], **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send a form as the page itself would."""
        parts = urlsplit(self.address)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        sent = {
            "Content-Type": "application/x-www-form-urlencoded",
            "Origin": f"http://{parts.netloc}",
            **headers,
        }
        with contextlib.closing(connection):
            target = path if path.startswith("/") else parts.path + path
            connection.request("POST", target, body=urlencode(form), headers=sent)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def page(self, path: str = "") -> Page:
        """Return a page that is there."""
        status, _, body = self.get(path)
        assert status == 200, body.decode()
        return Page(body.decode())


@contextlib.contextmanager
def looking(corpus: str, **snapshot: Any) -> Iterator[Site]:
    """Serve a corpus's page while the block runs."""
    addresses: list[str] = []
    started = threading.Event()

    def on_start(address: str) -> None:
        addresses.append(address)
        started.set()

    async def run() -> None:
        nonlocal task
        task = asyncio.current_task()
        with contextlib.suppress(asyncio.CancelledError):
            await serve(Server(corpus, Manifest(Storage(corpus)), **snapshot), 0, on_start)

    task: asyncio.Task | None = None
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert started.wait(60)
        yield Site(addresses[0])
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()
