"""A web site that does what the web does to a crawler, and a canary that must never be asked.

Every case says how a URL must end. The site speaks raw TCP, so that it can lie about anything.
"""

import base64
import collections
import gzip
import io
import socketserver
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from tests.heic_files import grid, heic, resized_header, single, tile
from tests.profiles import rgb_profile

OK = ("ok", None)


class Case(NamedTuple):
    """One URL (or what a list has in its place) and how it must end."""

    url: str
    caption: str
    status: str
    reason: str | None


# -- images ------------------------------------------------------------------------------------------------


def picture(width: int = 160, height: int = 120) -> Image.Image:
    """Four quarters: red, green, blue, yellow, by rows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 0)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def rotated_jpeg(orientation: int = 6) -> bytes:
    """A JPEG that only looks like ``picture()`` once its EXIF orientation (6: turn clockwise) is applied."""
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture().transpose(undo[orientation]), "JPEG", exif=exif, quality=95)


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG put together by hand: ``rows`` are the filtered, not yet compressed scan lines."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def rgb16_png() -> bytes:
    pixels = (np.asarray(picture()).astype(">u2") * 257).reshape(120, -1)
    return png(160, 120, 16, 2, b"".join(b"\0" + row.tobytes() for row in pixels))


def grey16_png() -> bytes:
    ramp = np.tile(np.linspace(0, 65535, 160).astype(">u2"), (120, 1))
    return png(160, 120, 16, 0, b"".join(b"\0" + row.tobytes() for row in ramp))


def rgba_png() -> bytes:
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[255], [0]]), 60, axis=0).repeat(160, axis=1)))
    return encoded(image, "PNG")


def palette_png() -> bytes:
    image = picture().quantize(8)
    return encoded(image, "PNG", transparency=image.getpixel((0, 0)))


def large_rgba_png(side: int) -> bytes:
    """A small file of very many pixels: what a decoder must bear where the limit allows it."""
    row = b"\0" + b"\x10\x80\xf0\x80" * side
    return png(side, side, 8, 6, row * side)


def large_rgba_webp() -> bytes:
    """The same in 38 bytes: 7070 x 7070 pixels of one half-transparent colour."""
    return bytes.fromhex("524946461e000000574542505650384c110000002f9d5be71607508a2ad4a3808188e87f0000")


# 7070 x 7070 pixels of one half-transparent colour, as Pillow writes them; zlib, base 85.
LARGE_AVIF = (
    rb"c-muNU{FXasVqn=%S>Yc0uY^>nP!-qnV9D5Xz0Yiz}S|XT9U{B0g4$ZIYm%5LqTS82?HA7E66O#1+y4|SSK?lKN-YvVPIeai"
    rb"vTe*i1QZ62lE)$0r4~-+bJ_M59|c6j1-WQ$^<nhvCP2GIX@>KY%@ZJ2_oZ|Q;?Aekts?|gSjKIv?2#=C&<>rnFU1!KzeRwL2"
    rb"^Ej7Rf9wNQEero(I7U0tJ~BnII8n4h{|=#gkZO=-epJ0}>KW&d({zOU|hPn#Rk()&TJ+L^&gpVi}Nt1<-0|5Tmpx&nmYdH62"
    rb"ViStVyC7g!Zn7MG;v7Fz+;WaeZh7FAj$!kjOcS&$10XQ0Db7@3+`7?@ZXS=-nd7+AV<QxZ#r7`WKwKbu?cyeDeZ!7RbTz+=e"
    rb"3p#Swi+<7yZjpxoUczDcocD|is`^tUU6P&6%*Dsr#dU>9&tcy?wm$K9JIlfxvryR8#Xs<yJmj*xK@a>1}*G&$OY3wfW)hLZu"
    rb"cyUwVwSyjM7HH5~JxR`g1&kGLaI9SG;K(phFuKhu;c~paEtQEwVV)x}GQ-cG3tX$e&T2uKd&%}6vY#DWoc`Ym32Y7oro|swp"
    rb"+8HL<%Ko>ywuCzYJbs6GtXP|iO5HVYc?lX@@^$`?-Jc|jY(pQ`NrVReI9jfyJa8o1Z<4n6j#r?;!NcEa}njt$2HRChJD|+<v"
    rb"CAEr|rw5lP{}O*w~+ac=qbOU%m`ePoC&q_wTgJ+~qsdFD%#IP=4r;()WIsnwr;AZ_~o}KdC<I@M_b>?W_UK=SyVnGi|nCX<="
    rb"g$t=2$8qr-_d+V#omsTW@6u5XLfX?b(j#G04exy;-p$9IRFTfMI^%i;i@o!2FVgEq1xnpTKZU5KESn;nLt$+QXO8UV|#iRJ"
)


def large_rgba_avif() -> bytes:
    return zlib.decompress(base64.b85decode(LARGE_AVIF))


def lying_avif() -> bytes:
    """The same, in a container that says 100 x 100."""
    return large_rgba_avif().replace(struct.pack(">II", 7070, 7070), struct.pack(">II", 100, 100))


def lying_heic() -> bytes:
    """512 x 512 by the container, 268 million pixels by the decoder's header."""
    header, content = tile(512)
    return single((resized_header(header, 16_384, 16_384), content), 512)


def bomb_png() -> bytes:
    return png(40_000, 40_000, 8, 6, b"\0" * 100_000)


def bomb_jpeg() -> bytes:
    data = bytearray(encoded(picture(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def bomb_webp() -> bytes:
    data = bytearray(encoded(picture(), "WEBP"))
    data[26:30] = struct.pack("<HH", 13_000, 13_000)
    return bytes(data)


def bomb_gif() -> bytes:
    data = bytearray(encoded(picture(), "GIF"))
    data[6:10] = struct.pack("<HH", 65_000, 65_000)
    return bytes(data)


def many_scans_jpeg() -> bytes:
    """A progressive JPEG whose last scan is repeated: minutes of decoding for a few kilobytes."""
    data = encoded(picture(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 2000 + data[-2:]


def animated(format_name: str) -> bytes:
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180)]
    return encoded(frames[0], format_name, save_all=True, append_images=frames[1:])


JPEG = encoded(picture(), "JPEG", quality=95)
SVG = b'<?xml version="1.0"?><!-- drawn --><svg xmlns="http://www.w3.org/2000/svg" width="90" height="90"/>'
HTML = b"<!DOCTYPE html><html><title>Gone</title><body>The image has moved.</body></html>"

OPTED_OUT_HEADERS = (
    "X-Robots-Tag: noai",
    "x-robots-tag: NoAI",
    "X-ROBOTS-TAG:noimageai",
    "X-Robots-Tag: max-image-preview: large, noai",
    "X-Robots-Tag: noarchive , noimageindex",
    "X-Robots-Tag: unavailable_after: Saturday, 25-Jun-2050 15:00:00 PST, noai",
    "X-Robots-Tag: nofollow\r\nX-Robots-Tag: noindex",
    "X-Robots-Tag: googlebot: nofollow\r\nX-Robots-Tag: noai",
    "X-Robots-Tag: capfilt: noai",
    "X-Robots-Tag: googlebot: nosnippet, CapFilt: noindex",
    "X-Robots-Tag: *: noai",
    "X-Robots-Tag: none",
    "X-Robots-Tag: noarchive; noai",
)
OTHERS_HEADERS = (
    "X-Robots-Tag: googlebot: noai",
    "X-Robots-Tag: otherbot: noindex, nofollow, noai",
    "X-Robots-Tag: max-image-preview: large, max-snippet: -1",
    "X-Robots-Tag: unavailable_after: Sat, 25-Jun-2050 15:00:00 PST",
    "X-Robots-Tag: all",
    "TDM-Reservation: 0",
)
# Names of places inside: {port} is the canary's.
INSIDE = (
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://127.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0.0.0.0:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://public.example@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@public.example/",
    "https://127.0.0.1:{port}/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://168.63.129.16/metadata",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[64:ff9b::7f00:1]/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
)
BAD_URLS = {
    "": "bad_url",
    "image.jpg": "bad_url",
    "//127.0.0.1/image.jpg": "bad_url",
    "http://": "bad_url",
    "http://:8080/image.jpg": "bad_url",
    "http://127.0.0.1:99999/image.jpg": "bad_url",
    "http://[::1/image.jpg": "bad_url",
    "http://exa mple.com/image.jpg": "bad_url",
    "file:///etc/passwd": "bad_scheme",
    "ftp://127.0.0.1/image.jpg": "bad_scheme",
    "data:image/png;base64,iVBORw0KGgo=": "bad_scheme",
    "javascript:alert(1)": "bad_scheme",
    "row:0": "bad_scheme",
}
BAD_REDIRECTS = {
    url: reason for url, reason in BAD_URLS.items() if reason == "bad_scheme" or "127.0.0.1:99999" in url
}


# -- the site ----------------------------------------------------------------------------------------------


class Exchange:
    """One request, and the ways to answer it."""

    def __init__(self, site: "HostileSite", stream: socketserver.StreamRequestHandler, nth: int) -> None:
        self.site, self.nth, self._stream = site, nth, stream

    def raw(self, data: bytes) -> None:
        self._stream.wfile.write(data)

    def send(self, body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> None:
        fields = [
            f"HTTP/1.1 {status}",
            f"Content-Length: {len(body) if length is None else length}",
            *headers,
        ]
        self.raw("\r\n".join([*fields, "", ""]).encode() + body)

    def redirect(self, location: str) -> None:
        self.send(b"", f"Location: {location}", status="302 Found")

    def wait(self, seconds: float) -> None:
        self.site.closing.wait(seconds)

    def forever(self, data: bytes, pause_s: float = 0.0) -> None:
        """Send until nobody listens; at most 300 MB."""
        for _ in range(300_000_000 // len(data)):
            if self.site.closing.is_set():
                return
            self.raw(data)
            self.wait(pause_s)

    def reset(self) -> None:
        self._stream.connection.setsockopt(
            socketserver.socket.SOL_SOCKET, socketserver.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
        )
        self._stream.connection.close()


Answer = Callable[[Exchange], None]


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: most clients of this site hang up on it."""


class Canary:
    """Counts who connects. Nobody should."""

    def __init__(self) -> None:
        self.requests = 0
        canary = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                canary.requests += 1
                self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(JPEG) + JPEG)

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self.server.server_address[1]


class HostileSite:
    """The site; a context manager. ``canary.requests`` must stay 0."""

    def __init__(self) -> None:
        self.canary = Canary()
        self.closing = threading.Event()
        self.requests: collections.Counter[str] = collections.Counter()
        self.user_agents: set[str] = set()
        self.robots_txt: Answer = _not_found
        self._lock = threading.Lock()
        self._answers = {path: (status, reason, answer) for path, status, reason, answer in self._pages()}
        site = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                site._handle(self)

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self.server.server_address[1]

    def __enter__(self) -> Self:
        for server in (self.server, self.canary.server):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in (self.server, self.canary.server):
            server.shutdown()
            server.server_close()

    def url(self, path: str) -> str:
        """Return the URL of a path of the site."""
        return f"http://127.0.0.1:{self.port}{path}"

    def crawl_settings(self) -> dict[str, Any]:
        """Return the ``[crawl]`` settings under which the cases end as they say, and soon."""
        return {
            "allow_hosts": (f"127.0.0.1:{self.port}",),
            "contact": "https://example.org/crawl",
            # Generous to a busy test machine: the honest pages of this site must never be late.
            "timeout_s": 15.0,
            "connect_timeout_s": 5.0,
            "backoff_s": 0.05,
            "requests_per_host": 64,
            "rate_per_host": 1000.0,
        }

    def cases(self) -> list[Case]:
        """Return every URL with the way it must end."""
        cases = [Case(self.url(path), f"page {path}", *page[:2]) for path, page in self._answers.items()]
        cases += [Case(url, "no URL", "refused", reason) for url, reason in BAD_URLS.items()]
        cases += [Case(url, "inside", "refused", "forbidden_address") for url in self._inside()]
        cases += [
            Case(self.url("/bücher/straße 1.jpg?größe=ä&b=%C3%A4#oben"), "not ASCII", *OK),
            Case(self.url("/100%.jpg"), "a bare percent", *OK),
            Case(f"  {self.url('/spaces.jpg')} ", "spaces around", *OK),
            Case(f"https://127.0.0.1:{self.port}/tls.jpg", "TLS to a port without", "failed", "tls"),
            Case("http://no-such-host.invalid/image.jpg", "no such host", "failed", "dns"),
        ]
        return cases

    def _inside(self) -> list[str]:
        return [url.format(port=self.canary.port) for url in INSIDE]

    def _handle(self, stream: socketserver.StreamRequestHandler) -> None:
        stream.connection.settimeout(30)
        if stream.rfile.peek(1)[:1] == b"\x16":
            stream.wfile.write(b"HTTP/1.1 400 This is not TLS\r\n\r\n")
            return
        request = stream.rfile.readline(65_536).decode("latin-1").split(" ")
        for line in iter(stream.rfile.readline, b""):
            name, _, value = line.decode("latin-1").strip().partition(":")
            if not name:
                break
            if name.lower() == "user-agent":
                self.user_agents.add(value.strip())
        if len(request) != 3 or request[0] != "GET":
            stream.wfile.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            return
        path = request[1]
        with self._lock:
            self.requests[path] += 1
            nth = self.requests[path]
        self._answer(path)(Exchange(self, stream, nth))

    def _answer(self, path: str) -> "Answer":
        if path == "/robots.txt":
            return self.robots_txt
        if path in self._answers:
            return self._answers[path][2]
        return _HIDDEN.get(path.partition("?")[0], _not_found)

    def _pages(self) -> Iterator[tuple[str, str, str | None, Answer]]:
        for path, body in GOOD_IMAGES.items():
            yield path, *OK, _sender(body)
        for path, (reason, body) in BAD_IMAGES.items():
            yield path, "invalid", reason, _sender(body)
        for path, (status, reason, answer) in _BEHAVIOURS.items():
            yield path, status, reason, answer
        for number, header in enumerate(OPTED_OUT_HEADERS):
            yield f"/opted-out/{number}.jpg", "opted_out", "x_robots_tag", _sender(JPEG, header)
        yield "/opted-out/tdm.jpg", "opted_out", "tdm_reservation", _sender(JPEG, "tdm-reservation: 1")
        for number, header in enumerate(OTHERS_HEADERS):
            yield f"/not-for-us/{number}.jpg", *OK, _sender(JPEG, header)
        for number, url in enumerate(self._inside()):
            yield f"/redirect/inside/{number}", "refused", "forbidden_address", _redirector(url)
        for number, (url, reason) in enumerate(BAD_REDIRECTS.items()):
            yield f"/redirect/bad/{number}", "refused", reason, _redirector(url)


def _sender(body: bytes, *headers: str) -> Answer:
    return lambda exchange: exchange.send(body, *headers)


def _redirector(location: str) -> Answer:
    return lambda exchange: exchange.redirect(location)


def _coded(status: str, *headers: str) -> Answer:
    return lambda exchange: exchange.send(b"", *headers, status=status)


def _not_found(exchange: Exchange) -> None:
    exchange.send(HTML, status="404 Not Found")


def _after(interim: bytes) -> Answer:
    def answer(exchange: Exchange) -> None:
        exchange.raw(interim)
        exchange.send(JPEG)

    return answer


def _at_last(times: int, refusal: Answer) -> Answer:
    return lambda exchange: refusal(exchange) if exchange.nth <= times else exchange.send(JPEG)


def _in_a_second(exchange: Exchange) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    _coded("429 Too Many Requests", f"Retry-After: {date}")(exchange)


# No number of seconds, and no date that a calendar has.
_RETRY_AFTER = (
    "01 Jan 99999999999999999999 00:00:00 GMT",
    "Mon, 01 Jan 9999 00:00:00 -2359",
    "Mon, 01 Jan 2024 00:00:00 +99999999999999999999",
    "9e99",
    "9" * 400,
    "-5",
    "\xb2",
    "soon",
)


def _endless_redirects(exchange: Exchange) -> None:
    exchange.redirect(f"/endless?{sum(exchange.site.requests.values())}")


def _drip(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + JPEG[:100])
    exchange.forever(b"x", pause_s=0.2)


def _drip_headers(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    exchange.forever(b"x", pause_s=0.2)


def _endless_body(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
    exchange.forever(JPEG * 50)


def _declared_huge(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 300000000\r\n\r\n")
    exchange.forever(JPEG * 50)


def _endless_trailer(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
    exchange.forever(b"X-More: more\r\n" * 1000)


def _endless_continue(exchange: Exchange) -> None:
    exchange.forever(b"HTTP/1.1 100 Continue\r\nX-Wait: a little\r\n\r\n" * 100)


def _chunked(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(JPEG), 500):
        part = JPEG[start : start + 500]
        exchange.raw(b"%x\r\n%b\r\n" % (len(part), part))
    exchange.raw(b"0\r\n\r\n")


def _negative_chunk(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n" + JPEG)


def _endless_negative_chunk(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
    exchange.forever(JPEG * 50)


GOOD_IMAGES = {
    "/plain.jpg": JPEG,
    "/progressive.jpg": encoded(picture(), "JPEG", progressive=True, quality=95),
    "/grey.jpg": encoded(picture().convert("L"), "JPEG"),
    "/cmyk.jpg": encoded(picture().convert("CMYK"), "JPEG", quality=95),
    "/rotated3.jpg": rotated_jpeg(3),
    "/rotated6.jpg": rotated_jpeg(6),
    "/rotated8.jpg": rotated_jpeg(8),
    "/phone.mpo": encoded(picture(), "MPO", save_all=True, append_images=[picture()]),
    "/plain.png": encoded(picture(), "PNG"),
    "/rgb16.png": rgb16_png(),
    "/grey16.png": grey16_png(),
    "/rgba.png": rgba_png(),
    "/palette.png": palette_png(),
    "/bilevel.png": encoded(picture().convert("1"), "PNG"),
    "/plain.webp": encoded(picture(), "WEBP", quality=95),
    "/rgba.webp": encoded(picture().convert("RGBA"), "WEBP"),
    "/plain.avif": encoded(picture(), "AVIF", quality=90),
    "/rgba.avif": encoded(picture().convert("RGBA"), "AVIF"),
    "/plain.heic": heic(picture(), quality=90),
    "/rgba.heic": heic(picture().convert("RGBA")),
    "/still.gif": encoded(picture(), "GIF"),
    "/plain.bmp": encoded(picture(), "BMP"),
    "/large-rgba.png": large_rgba_png(7_000),
    "/large-rgba.webp": large_rgba_webp(),
    "/large-rgba.avif": large_rgba_avif(),
    "/large.heic": grid(tile(512), 512, 13, 13 * 512),
    "/caf%C3%A9.jpg": JPEG,
    "/b%C3%BCcher/stra%C3%9Fe%201.jpg?gr%C3%B6%C3%9Fe=%C3%A4&b=%C3%A4": JPEG,
    "/100%25.jpg": JPEG,
    "/spaces.jpg": JPEG,
    "/no-end.jpg": JPEG[:-2],
    "/wide-gamut.jpg": encoded(Image.new("RGB", (96, 96), (189, 35, 35)), "JPEG", icc_profile=rgb_profile()),
}
BAD_IMAGES = {
    "/empty.jpg": ("empty_body", b""),
    "/html.jpg": ("not_an_image", HTML),
    "/text.jpg": ("not_an_image", b"404"),
    "/gzip.jpg": ("not_an_image", b"\x1f\x8b\x08\0" + bytes(500)),
    "/drawing.svg": ("format_refused", SVG),
    "/scan.tiff": ("format_refused", encoded(picture(), "TIFF")),
    "/packed.svgz": ("format_refused", gzip.compress(SVG, mtime=0)),
    "/picture.tga": ("format_refused", encoded(picture(), "TGA")),
    "/icon.ico": ("format_refused", encoded(picture(), "ICO")),
    "/animated.gif": ("format_refused", animated("GIF")),
    "/animated.webp": ("format_refused", animated("WEBP")),
    "/animated.png": ("format_refused", animated("PNG")),
    "/animated.avif": ("format_refused", animated("AVIF")),
    "/several.heic": ("format_refused", heic(picture(), save_all=True, append_images=[picture()])),
    "/packed-metadata.heic": ("format_refused", grid(tile(512), 512, 2, 1024, mime=b"\0text/xml\0deflate\0")),
    "/many-scans.jpg": ("format_refused", many_scans_jpeg()),
    "/truncated.jpg": ("image_truncated", JPEG[: len(JPEG) // 2]),
    "/half-with-an-end.jpg": ("image_truncated", JPEG[: len(JPEG) // 2] + b"\xff\xd9"),
    "/truncated-header.jpg": ("image_truncated", JPEG[:100]),
    "/truncated.png": ("image_truncated", rgb16_png()[:-60]),
    "/truncated.webp": ("image_truncated", encoded(picture(), "WEBP", lossless=True)[:-40]),
    "/truncated.avif": ("image_truncated", encoded(picture(), "AVIF")[:-40]),
    "/truncated.heic": ("image_truncated", heic(picture())[:-40]),
    "/truncated-header.heic": ("image_truncated", heic(picture())[:200]),
    "/truncated.gif": ("image_truncated", encoded(picture(), "GIF")[:-200]),
    "/bomb.png": ("too_many_pixels", bomb_png()),
    "/bomb.jpg": ("too_many_pixels", bomb_jpeg()),
    "/bomb.webp": ("too_many_pixels", bomb_webp()),
    "/bomb.gif": ("too_many_pixels", bomb_gif()),
    "/lying.avif": ("too_many_pixels", lying_avif()),
    "/bomb.heic": ("too_many_pixels", grid(tile(512), 512, 16, 16 * 512)),
    "/lying.heic": ("too_many_pixels", lying_heic()),
    "/lying-grid.heic": ("too_many_pixels", grid(tile(512), 512, 13, 100)),
    "/pixel.gif": ("too_small", encoded(picture(1, 1), "GIF")),
    "/icon.png": ("too_small", encoded(picture(32, 32), "PNG")),
    "/banner.jpg": ("aspect_ratio", encoded(picture(728, 90), "JPEG")),
}
_BEHAVIOURS: dict[str, tuple[str, str | None, Answer]] = {
    "/404": ("failed", "http_4xx", _not_found),
    "/403": ("failed", "http_4xx", _coded("403 Forbidden")),
    "/410": ("failed", "http_4xx", _coded("410 Gone")),
    "/500": ("failed", "http_5xx", _coded("500 Internal Server Error")),
    "/204": ("failed", "http_other", lambda exchange: exchange.raw(b"HTTP/1.1 204 No Content\r\n\r\n")),
    "/304": ("failed", "http_other", lambda exchange: exchange.raw(b"HTTP/1.1 304 Not Modified\r\n\r\n")),
    "/429": ("failed", "rate_limited", _coded("429 Too Many Requests", "Retry-After: 1")),
    "/429/for-an-hour": ("failed", "rate_limited", _coded("429 Too Many Requests", "Retry-After: 3600")),
    "/429/for-a-second": (*OK, _at_last(1, _coded("429 Too Many Requests", "Retry-After: 1"))),
    "/429/until-a-date": (*OK, _at_last(1, _in_a_second)),
    **{
        f"/429/nonsense/{number}": (
            "failed",
            "rate_limited",
            _coded("429 Too Many Requests", f"Retry-After: {value}"),
        )
        for number, value in enumerate(_RETRY_AFTER)
    },
    "/503/twice": (*OK, _at_last(2, _coded("503 Service Unavailable"))),
    "/reset/once": (*OK, _at_last(1, Exchange.reset)),
    "/reset": ("failed", "connect", Exchange.reset),
    "/hang-up": ("failed", "connect", lambda exchange: None),
    "/garbage": ("failed", "bad_response", lambda exchange: exchange.raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")),
    "/hang": ("failed", "timeout", lambda exchange: exchange.wait(30)),
    "/drip": ("failed", "timeout", _drip),
    "/drip-headers": ("failed", "timeout", _drip_headers),
    "/length/too-long": (
        "failed",
        "body_truncated",
        lambda exchange: exchange.send(JPEG, length=len(JPEG) + 99),
    ),
    "/length/too-short": (
        "invalid",
        "image_truncated",
        lambda exchange: exchange.send(JPEG, length=len(JPEG) - 99),
    ),
    "/length/none": (*OK, lambda exchange: exchange.raw(b"HTTP/1.1 200 OK\r\n\r\n" + JPEG)),
    "/length/nonsense": (
        *OK,
        lambda exchange: exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\n" + JPEG),
    ),
    "/chunked": (*OK, _chunked),
    "/chunked/broken": (
        "failed",
        "body_truncated",
        lambda exchange: exchange.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + JPEG),
    ),
    "/chunked/negative": ("failed", "bad_response", _negative_chunk),
    "/chunked/minus-one": ("failed", "bad_response", _endless_negative_chunk),
    "/gzip-label": (*OK, _sender(JPEG, "Content-Encoding: gzip")),
    "/gzip": (*OK, _sender(gzip.compress(JPEG, mtime=0), "Content-Encoding: gzip")),
    "/deflate": (*OK, _sender(zlib.compress(JPEG), "Content-Encoding: deflate")),
    "/gzip/bomb": (
        "refused",
        "body_too_large",
        _sender(gzip.compress(bytes(40_000_000), 1, mtime=0), "Content-Encoding: gzip"),
    ),
    "/brotli": ("failed", "bad_response", _sender(b"\x8b\x02\x80!\x03", "Content-Encoding: br")),
    "/early-hints": (*OK, _after(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" * 3)),
    "/early-hints/endless": (
        "refused",
        "header_too_large",
        lambda exchange: exchange.forever(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" * 100),
    ),
    "/203": (*OK, lambda exchange: exchange.send(JPEG, status="203 Non-Authoritative Information")),
    "/206": ("failed", "http_other", lambda exchange: exchange.send(JPEG[:99], status="206 Partial Content")),
    "/999": ("failed", "http_other", _coded("999 Request denied")),
    "/wrong-type": (*OK, _sender(JPEG, "Content-Type: text/html")),
    "/300mb": ("refused", "body_too_large", _endless_body),
    "/300mb/declared": ("refused", "body_too_large", _declared_huge),
    "/headers/many": ("refused", "header_too_large", _sender(JPEG, *["X-Flood: 1"] * 5000)),
    "/headers/huge": ("refused", "header_too_large", _sender(JPEG, "X-Huge: " + "x" * 1_000_000)),
    "/headers/continue": ("refused", "header_too_large", _endless_continue),
    "/redirect/loop": ("refused", "redirect_loop", _redirector("/redirect/loop/back")),
    "/redirect/self": ("refused", "redirect_loop", _redirector("/redirect/self")),
    "/redirect/endless": ("refused", "too_many_redirects", _endless_redirects),
    "/redirect/nowhere": ("failed", "bad_response", _coded("302 Found")),
    "/redirect/chain": (*OK, _redirector("/hop/1")),
    "/redirect/not-ascii": (*OK, _redirector("/café.jpg")),
}
_HIDDEN: dict[str, Answer] = {
    "/flaky/1": _at_last(1, _coded("503 Service Unavailable")),
    "/flaky/2": _at_last(1, _coded("503 Service Unavailable")),
    "/hop/1": _redirector("hop2"),
    "/hop/hop2": lambda exchange: exchange.redirect(exchange.site.url("/plain.jpg").removeprefix("http:")),
    "/redirect/loop/back": _redirector("/redirect/loop"),
    "/endless": _endless_redirects,
    "/heavy": lambda exchange: exchange.send(JPEG + bytes(19_000_000)),
}
