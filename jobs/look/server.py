"""The page's server: on this machine alone, behind a random token in its address, and never to the outside.

No path that a browser sends is opened: names are looked up among what is committed. What a page may load is said by
its content security policy: this server's style, script and images.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from typing import Any, cast, get_args
from urllib.parse import parse_qsl

from aiohttp import web

from jobs.look import questions
from jobs.look.grid import grid
from jobs.look.overview import overview
from jobs.look.page import Pages, image_path, style
from jobs.look.selection import preview
from jobs.look.snapshot import Row, Snapshot, Snapshots
from jobs.look.unmark import held_marks, unmarking
from jobs.look.view import View
from pipeline.corpus.records import Records
from pipeline.lineage.sample_trace import trace
from pipeline.manifest.manifest import Manifest
from pipeline.marks.marking import Verdict, mark, take_back
from schemas.errors import CapfiltError
from schemas.marks import is_value
from schemas.statuses import What

HOST = "127.0.0.1"
_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer: a form would come without its origin, by which a mark is known to be made on this page.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# The formats that are stored, by their first bytes; anything else is not sent.
_MEDIA_TYPES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"RIFF", "image/webp"))
# Of a mark that is made by one key.
_REASON = "seen on the page"
_MAX_UID = 64
_MAX_FORM_BYTES = 64 * 2**10

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Serves the pages of one corpus.

    Args:
        corpus: as the user named it.
        max_images: see ``Snapshot``.
    """

    def __init__(self, corpus: str, manifest: Manifest, **snapshot: Any) -> None:
        self.token = secrets.token_urlsafe(24)
        self.snapshots = Snapshots(manifest, **snapshot)
        self._manifest = manifest
        base = f"/{self.token}/"
        self._pages = Pages(corpus, base, lambda card: base + path if (path := image_path(card)) else "")

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        app = web.Application(middlewares=[self._guard], client_max_size=_MAX_FORM_BYTES)
        base = f"/{self.token}"
        app.router.add_get(f"{base}/", self._page(self._overview))
        app.router.add_get(f"{base}/grid", self._page(self._grid))
        app.router.add_get(f"{base}/runs", self._page(self._runs))
        app.router.add_get(f"{base}/selection", self._page(self._selection))
        app.router.add_get(f"{base}/sample/{{uid}}", self._page(self._sample))
        app.router.add_get(f"{base}/unmark", self._page(self._unmark))
        app.router.add_post(f"{base}/mark", self._mark)
        app.router.add_get(f"{base}/image/{{source}}/{{shard}}/{{key}}", self._image)
        for name, kind, text in _assets():
            app.router.add_get(f"{base}/{name}", _constant(text, kind))
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse other hosts (a name that was pointed at this machine), and add the headers to every answer."""
        host = request.headers.get("Host", "").rpartition(":")[0] or request.headers.get("Host", "")
        try:
            if host not in (HOST, "localhost"):
                raise web.HTTPForbidden(text="this server answers to 127.0.0.1 alone")
            response = await handler(request)
        except CapfiltError as error:
            response = _html(self._pages.message("This cannot be shown", str(error)), 400)
        except web.HTTPException as error:
            response = error
        response.headers.update(_HEADERS)
        if isinstance(response, web.HTTPException):
            raise response
        return response

    def _page(self, render: Callable[[Snapshot, web.Request], str]) -> Handler:
        """Return what answers a request with a page of the newest snapshot, which is read in a thread."""

        async def answer(request: web.Request) -> web.Response:
            return _html(await asyncio.to_thread(lambda: render(self.snapshots.current(), request)))

        return answer

    def _overview(self, snapshot: Snapshot, request: web.Request) -> str:
        view = View.parse(request.query.items())
        return self._pages.overview(snapshot, overview(snapshot, seed=view.seed))

    def _grid(self, snapshot: Snapshot, request: web.Request) -> str:
        return self._pages.grid(snapshot, grid(snapshot, View.parse(request.query.items())))

    def _runs(self, snapshot: Snapshot, _: web.Request) -> str:
        asked = {
            "runs": questions.RUNS,
            "throughput": questions.THROUGHPUT,
            "trainings": questions.TRAININGS,
        }
        return self._pages.runs(snapshot, {name: snapshot.ask(sql) for name, sql in asked.items()})

    def _selection(self, snapshot: Snapshot, request: web.Request) -> str:
        return self._pages.selection(snapshot, preview(snapshot, request.query.items()))

    def _sample(self, snapshot: Snapshot, request: web.Request) -> str:
        uid = request.match_info["uid"]
        if not (uid.isalnum() and uid.isascii() and len(uid) <= _MAX_UID):
            raise web.HTTPNotFound(text="no such sample")
        traces = [_with_card(traced) for traced in trace(self._manifest, uid)]
        return self._pages.sample(
            snapshot, uid, [traced | {"marks": snapshot.marks_of_sample(traced)} for traced in traces]
        )

    def _unmark(self, snapshot: Snapshot, request: web.Request) -> str:
        form = dict(request.query)
        back = View.parse(parse_qsl(form["back"])).query() if "back" in form else None
        return self._pages.unmark(snapshot, unmarking(snapshot, form), back)

    async def _mark(self, request: web.Request) -> web.Response:
        """Make a mark, or take one back, and lead back to where it was made."""
        if request.headers.get("Origin") != f"http://{request.host}":
            raise web.HTTPForbidden(text="a mark is made on the page itself")
        form = {name: value for name, value in (await request.post()).items() if isinstance(value, str)}
        await asyncio.to_thread(self._make_mark, form)
        if "back" not in form:
            raise web.HTTPSeeOther(f"sample/{form['uid']}")
        back = View.parse(parse_qsl(form["back"])).query()
        raise web.HTTPSeeOther(f"grid?{back}#u{form['uid']}")

    def _make_mark(self, form: dict[str, str]) -> None:
        what, uid = form.get("what"), form.get("uid", "")
        if what not in get_args(What) or not is_value("uid", uid):
            raise CapfiltError("a mark names a uid, and says drop or not-this-caption")
        self._manifest.storage.require_conditional_puts()
        verdict = Verdict(
            what=cast(What, what), named_by="uid", values=(uid,), reason=form.get("reason") or _REASON
        )
        records, snapshot = Records(self._manifest.storage), self.snapshots.current()
        if "undo" in form:
            held, *_ = held_marks(snapshot, form)
            take_back(records, replace(verdict, named_by=held["named_by"], values=(held["value"],)))
        else:
            mark(records, verdict, within=[(form.get("source", ""), form.get("shard", ""))])
        snapshot.reread_marks()

    async def _image(self, request: web.Request) -> web.Response:
        names = (request.match_info[name] for name in ("source", "shard", "key"))
        images = (await asyncio.to_thread(self.snapshots.current)).images
        data = await asyncio.to_thread(images.read, *names)
        kind = next((kind for start, kind in _MEDIA_TYPES if data and data.startswith(start)), None)
        if data is None or kind is None:
            raise web.HTTPNotFound(text="no such image")
        return web.Response(body=data, content_type=kind)


def _with_card(traced: Row) -> Row:
    """Return a sample's trace with the row of ``cards`` that its image and status are shown from."""
    last, selection = traced["fetches"][-1], traced["selection"] or {}
    names = ("source", "shard", "key", "url")
    card = {name: traced[name] for name in names} | {
        "status": selection.get("status") or last["status"],
        "reason": selection.get("reason") or last["reason"],
        "captions": selection.get("captions"),
        **{name: last[name] for name in ("http_status", "width", "height")},
    }
    return traced | {"card": card}


def _assets() -> list[tuple[str, str, str]]:
    """Return the files that every page refers to: name, media type, content."""
    folder, kinds = files("jobs.look"), {"keys.js": "text/javascript", "icon.svg": "image/svg+xml"}
    read = [(name, kind, folder.joinpath(name).read_text(encoding="utf-8")) for name, kind in kinds.items()]
    return [("style.css", "text/css", style()), *read]


def _constant(text: str, kind: str) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=text, content_type=kind)

    return answer


def _html(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, content_type="text/html", status=status)


async def serve(server: Server, port: int, started: Callable[[str], None]) -> None:
    """Serve until cancelled; ``started`` is called with the address. Raises CapfiltError where the port is taken."""
    runner = web.AppRunner(server.application(), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, port)
        try:
            await site.start()
        except OSError as error:
            raise CapfiltError(
                f"--port {port}: {error.strerror}; give another, or 0 for a free one"
            ) from error
        number = runner.addresses[0][1]
        started(f"http://{HOST}:{number}/{server.token}/")
        # What the first page needs is read before it is asked for.
        await asyncio.to_thread(_warm, server.snapshots)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
        server.snapshots.close()


def _warm(snapshots: Snapshots) -> None:
    with contextlib.suppress(CapfiltError):  # the page says it, too
        snapshot = snapshots.current()
        with ThreadPoolExecutor(1) as beside:
            prepared = beside.submit(snapshot.prepare)
            overview(snapshot)
            prepared.result()
