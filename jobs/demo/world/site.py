"""The demo's web: one loopback server that behaves as a real web does.

Every page is a pure function of (seed, number), both of which stand in its
path, so that the truth about any URL is known without the server, whatever
port it had.
"""

import csv
import io
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.demo.world.alt_texts import AltKind, alt_text
from jobs.demo.world.drawing import render
from jobs.demo.world.pictures import Encoding, encode, published
from jobs.demo.world.responses import (
    ALT_KINDS,
    BLOCK,
    FAILURES,
    OPT_OUTS,
    STATUS_BY_OUTCOME,
    SUCCESSES,
    ResponseKind,
)
from jobs.demo.world.scenes import Scene

DUPLICATE_EVERY = 100
HANG_S = 60.0
_PATH = re.compile(r"/w(?P<seed>\d+)/.*?(?P<number>\d{6})(?:\.\w+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One URL of the demo's web and all that is true of it."""

    seed: int
    number: int
    scene: Scene
    outcome: ResponseKind
    alt_kind: AltKind
    alt: str
    encoding: Encoding

    @property
    def image_path(self) -> str:
        """The path that answers with the image itself."""
        folder = "größe/schön" if self.outcome == "non_ascii_path" else "photos"
        return f"/w{self.seed}/{folder}/{self.number:06}.{self.encoding.format}"

    @property
    def path(self) -> str:
        """The path that the URL list names: the image's own, or one that redirects to it."""
        if self.outcome in ("redirect", "redirect_chain", "redirect_loop"):
            return f"/w{self.seed}/go/{self.number:06}"
        return self.image_path


@lru_cache(maxsize=64)
def _block(quotas: tuple[tuple[str, int], ...], seed: int, block: int) -> list[str]:
    names = [name for name, count in quotas for _ in range(count)]
    assert len(names) == BLOCK
    random.Random(f"{seed}/block/{block}/{names[0]}").shuffle(names)
    return names


@lru_cache(maxsize=10_000)
def page(number: int, seed: int = 0) -> Page:
    """Describe the page of that number."""
    rng = random.Random(f"{seed}/page/{number}")
    scene, encoding = Scene.random(rng), Encoding.random(rng)
    outcome: Any = _block(tuple((SUCCESSES | FAILURES).items()), seed, number // BLOCK)[number % BLOCK]
    alt_kind: Any = _block(tuple(ALT_KINDS.items()), seed, number // BLOCK)[number % BLOCK]
    if outcome in ("truncated_jpeg", "exif_rotated"):
        encoding = Encoding(size_px=encoding.size_px, format="jpg", quality=encoding.quality)
    alt = alt_text(scene, alt_kind, rng)
    return Page(
        seed=seed, number=number, scene=scene, outcome=outcome, alt_kind=alt_kind, alt=alt, encoding=encoding
    )


def page_of(url: str) -> Page:
    """Find the page that a URL (or path) of any of the world's servers names.

    Raises:
        KeyError: The URL is not of this world.
    """
    match = _PATH.fullmatch(unquote(urlsplit(url).path))
    if match is None:
        raise KeyError(url)
    return page(int(match["number"]), int(match["seed"]))


def scene_of(url: str) -> Scene:
    """Return the scene that a URL's image shows (see `page_of`)."""
    return page_of(url).scene


def pages(num_urls: int = 2400, seed: int = 0) -> list[Page]:
    """List the pages behind a URL list, row by row; one row in a hundred repeats an earlier page."""
    return [
        page(number - 50 if number % DUPLICATE_EVERY == DUPLICATE_EVERY - 1 else number, seed)
        for number in range(num_urls)
    ]


def write_url_list(path: Path | str, base_url: str, num_urls: int = 2400, seed: int = 0) -> None:
    """Write the columns url and caption (the alt text), as Parquet or CSV by the file's suffix."""
    listed = pages(num_urls, seed)
    urls, captions = [base_url + p.path for p in listed], [p.alt for p in listed]
    if Path(path).suffix == ".parquet":
        pq.write_table(pa.table({"url": urls, "caption": captions}), path)
        return
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "caption"), *zip(urls, captions, strict=True)])


@lru_cache(maxsize=8192)
def image_bytes(number: int, seed: int = 0) -> bytes:
    """Return the body that the page's image path answers with."""
    shown = page(number, seed)
    picture_seed = random.Random(f"{seed}/picture/{number}").getrandbits(32)
    body = io.BytesIO()
    match shown.outcome:
        case "tiny":
            return encode(Image.new("RGB", (1, 1)), Encoding(size_px=(1, 1), format="png", quality=90))
        case "extreme_aspect":
            return encode(render(shown.scene, (720, 40), picture_seed), shown.encoding)
        case "html_as_image":
            return b"<!DOCTYPE html><html><title>Moved</title><p>This picture has moved.</html>"
        case "exif_rotated":
            image = render(shown.scene, shown.encoding.size_px, picture_seed)
            exif = Image.Exif()
            exif[0x0112] = 6  # Orientation: turn by 90 degrees clockwise to see it upright.
            sideways = image.transpose(Image.Transpose.ROTATE_90)
            sideways.save(body, "JPEG", quality=shown.encoding.quality, exif=exif)
            return body.getvalue()
        case "truncated_jpeg":
            whole = published(shown.scene, shown.encoding, picture_seed)
            return whole[: len(whole) * 2 // 5]
    return published(shown.scene, shown.encoding, picture_seed)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # The default of 5 drops connections of a crawler with 64 threads.

    def __init__(self, address: tuple[str, int], flaky: bool) -> None:
        super().__init__(address, _Handler)
        self.flaky = flaky
        self.stopping = threading.Event()
        self.requests_by_path: Counter[str] = Counter()
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A crawler that gives up on a slow page closes the connection: nothing to report.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def is_first_request(self, path: str) -> bool:
        with self.lock:
            self.requests_by_path[path] += 1
            return self.requests_by_path[path] == 1


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    timeout = HANG_S

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.head(status, len(body), **headers)
        self.wfile.write(body)

    def head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def do_GET(self) -> None:
        path = unquote(self.path)
        if path == "/robots.txt":
            return self.answer(200, b"User-agent: *\nAllow: /\n", Content_Type="text/plain")
        try:
            shown = page_of(path)
        except KeyError:
            return self.answer(404, b"no such page", Content_Type="text/plain")
        if path != shown.image_path:
            return self.redirect(path, shown)
        first = self.server.flaky and self.server.is_first_request(path)
        match shown.outcome:
            case "not_found" | "gone" | "forbidden" | "server_error":
                self.answer(STATUS_BY_OUTCOME[shown.outcome], b"sorry", Content_Type="text/plain")
            case "unavailable_once" if first:
                self.answer(503, b"busy", Content_Type="text/plain")
            case "rate_limited_once" if first:
                self.answer(429, b"slow down", Content_Type="text/plain", Retry_After="1")
            case "hang":
                self.server.stopping.wait(HANG_S)
                self.close_connection = True
            case "drip":
                self.drip(shown)
            case _:
                self.image(shown)

    def redirect(self, path: str, shown: Page) -> None:
        here = f"/w{shown.seed}/go/{shown.number:06}"
        there = f"/w{shown.seed}/moved/{shown.number:06}"
        match shown.outcome:
            case "redirect":
                target = shown.image_path
            case "redirect_chain":
                target = there if path == here else shown.image_path
            case "redirect_loop":
                target = there if path == here else here
            case _:
                return self.answer(404, b"no such page", Content_Type="text/plain")
        self.answer(301 if path == here else 302, Location=target)

    def image(self, shown: Page) -> None:
        kind = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}[shown.encoding.format]
        headers = {"Content_Type": kind}
        if shown.outcome == "html_as_image" and shown.number % 2:
            headers["Content_Type"] = "text/html"
        if shown.outcome == "opted_out":
            name, value = OPT_OUTS[shown.number % len(OPT_OUTS)]
            headers[name] = value
        self.answer(200, image_bytes(shown.number, shown.seed), **headers)

    def drip(self, shown: Page) -> None:
        body = image_bytes(shown.number, shown.seed)
        self.head(200, len(body), Content_Type="image/jpeg")
        self.close_connection = True
        for i in range(int(HANG_S / 0.25)):
            try:
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
            except OSError:
                return  # The client gave up, as it should.
            if self.server.stopping.wait(0.25):
                return


@contextmanager
def serving(port: int = 0, flaky: bool = True) -> Iterator[str]:
    """Serve the world on loopback while the block runs; yield the base URL.

    Args:
        port: 0 takes a free one.
        flaky: Let "unavailable_once" and "rate_limited_once" pages refuse their
            first request. False makes every answer a function of the path
            alone, so that an interrupted and repeated crawl sees the same web.
    """
    server = _Server(("127.0.0.1", port), flaky)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="demo-site", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
